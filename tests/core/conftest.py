"""Factories of the core tests: a pool file, a tiny model folder, a run directory, score rows."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pivottrace_verl.estimators import ESTIMATORS
from pivottrace_verl.pool import RunDir
from pivottrace_verl.traces import FEATURE_NAMES


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


@pytest.fixture
def score_row() -> Callable[..., dict[str, Any]]:
    def make(pt_id: str, answers: Sequence[tuple[str, int]] = (("1", 4),), **changed: Any) -> Any:
        n = sum(count for _, count in answers)
        row: dict[str, Any] = {
            "pt_id": pt_id,
            "n_rollouts": n,
            "answers": [{"answer": a, "count": c} for a, c in answers],
            "majority": answers[0][0] if answers else None,
            "unparseable": 0,
            "timed_out": 0,
            "truncated": 0,
            "length_mean": 10.0,
            "logprob_mean": -0.5,
            "rollouts": [],
            **{f"uncertainty/{name}": 0.5 for name in ESTIMATORS},
            **{f"features/{name}": 0.5 for name in FEATURE_NAMES},
        }
        return {**row, **changed}

    return make
