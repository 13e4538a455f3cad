"""Factories of the core tests: a pool file, a model folder, a run directory, a pool whose truth is
known."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pivottrace_verl.calibration import Outcome
from pivottrace_verl.pool import RunDir


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    return folder


@pytest.fixture
def make_run(tmp_path: Path, model: Path) -> Callable[..., RunDir]:
    def make(n: int = 12, answers_kind: str = "exact", name: str = "run") -> RunDir:
        rows = [{"prompt": chat(f"What is {i} + 1?"), "data_source": "sums"} for i in range(n)]
        pool = write_jsonl(tmp_path / f"{name}-pool.jsonl", rows)
        return RunDir.create(tmp_path / name, pool, model, answers_kind=answers_kind)

    return make


CHEAP = ("entropy", "self_certainty", "consistency", "nll", "length", "entropy_forks")
PIVOTS = ("pivot_density", "pivot_count")


@dataclass(frozen=True)
class Bed:
    """A synthetic pool whose truth is known."""

    scores: pa.Table
    probes: list[Outcome]
    rest: np.ndarray
    """Rows of the scores that are no probes."""
    pass_rate: np.ndarray
    """[P] of every prompt."""


@pytest.fixture
def bed() -> Callable[..., Bed]:
    """Pools in which `nothing`, only `consistency`, only `pivots` (with the sign flipped) or only
    a `combination` of the features follows how hard a prompt is; all else is noise, part of it
    shared with the length. 8 rollouts a prompt, wrong answers of three kinds."""

    def make(knows: str, seed: int = 0, *, pool: int = 400, probes: int = 64) -> Bed:
        rng = np.random.default_rng(seed)
        skill, shared = rng.normal(size=(2, pool))
        right = rng.binomial(8, 1 / (1 + np.exp(-2.5 * skill)))
        wrong = right <= [rng.multinomial(8 - r, [0.5, 0.3, 0.2]).max() for r in right]
        columns = {f"uncertainty/{n}": rng.normal(size=pool) + 0.7 * shared for n in CHEAP}
        columns["uncertainty/random"] = rng.random(pool)
        columns |= {f"uncertainty/{n}": rng.normal(size=pool) + 0.5 * shared for n in PIVOTS}
        features = rng.normal(size=(pool, 8))
        if knows == "consistency":
            columns["uncertainty/consistency"] = -skill + 0.8 * rng.normal(size=pool)
        elif knows == "pivots":
            columns["uncertainty/pivot_density"] = skill + 0.6 * rng.normal(size=pool)
            columns["uncertainty/pivot_count"] = skill + 1.2 * rng.normal(size=pool)
        elif knows == "combination":
            # Their sum is the skill; each alone is mostly noise.
            six = features[:, :6]
            features[:, :6] = six - six.mean(axis=1, keepdims=True) - skill[:, None] / 6**0.5
        else:
            assert knows == "nothing"
        columns |= {f"features/f{i}": features[:, i] for i in range(8)}
        ids = [f"p{i:05d}" for i in range(pool)]
        length = 100 + 20 * shared + 5 * rng.normal(size=pool)
        at = rng.choice(pool, probes, replace=False)
        return Bed(
            pa.table({"pt_id": ids, "length_mean": length, **columns}),
            [Outcome(ids[i], right[i] / 8, bool(not wrong[i])) for i in at],
            np.setdiff1d(np.arange(pool), at),
            right / 8,
        )

    return make
