"""A factory for run directories: real files in every format the report reads, invented contents."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pivottrace_verl.estimators import ESTIMATORS
from pivottrace_verl.pivots import FEATURES, DetectorConfig, calibrate_tau, find_pivots
from pivottrace_verl.pool import RunDir, write_json_atomic
from pivottrace_verl.triage import TriageConfig, choose_probes, outcomes, triage, uncertainty
from tests.score_table import score_row

WORDS = ("so", "try", "3", "*", "4", "=", "12", "then", "go", "back", "and", "try", "again")


@dataclass(frozen=True)
class Spec:
    """What a synthetic run looks like."""

    upto: str = "train"
    prompts: int = 100
    best: str = "pivot_count"
    """The estimator that follows difficulty; the others are mostly noise."""
    pivots_informative: bool = True
    hostile: str = ""
    """Put into prompts, tokens, answers and the data source."""
    drop_keys: tuple[str, ...] = ()
    tokens: int = 90


def make_trace(rng: np.random.Generator, n_tokens: int, jumps: int) -> np.ndarray:
    """[T, L=2, H=1, F]: a slow drift with `jumps` sudden steps in the followed feature."""
    x = 0.2 + 0.02 * np.abs(rng.normal(size=n_tokens)).cumsum() / np.sqrt(n_tokens)
    for at in rng.choice(np.arange(5, n_tokens), size=jumps, replace=False):
        x[at : at + 6] += rng.uniform(0.2, 0.4)
    trace = np.zeros((n_tokens, 2, 1, len(FEATURES)), dtype=np.float32)
    trace[..., FEATURES.index("response_long_mass")] = x[:, None, None]
    return trace


def make_run(path: Path, spec: Spec) -> RunDir:
    """A run directory made up to and including the stage `spec.upto`."""
    rng = np.random.default_rng(7)
    run = make_pool(path, spec)
    if spec.upto == "new":
        return run
    truth = score_run(run, spec, rng)
    if spec.upto == "score":
        return run
    buy_probes(run, truth)
    if spec.upto == "probe":
        return run
    config = TriageConfig(estimator=spec.best)
    scores, ledger = run.scores(), run.ledger()
    found = outcomes(scores, ledger.labels("probe"), "exact")
    plan = triage(scores, found, ledger.purposes(), config)
    run.write_plan(plan.rows, plan.info())
    if spec.upto == "triage":
        return run
    buy(run, plan.to_buy(), truth, "annotate")
    if spec.upto == "annotate":
        return run
    write_metrics(run, spec, rng)
    run.update_manifest(timings={"score": 61.0, "train": 300.4})
    validation = {
        "before": {"mean4": 0.31, "greedy": 0.35},
        "after": {"mean4": 0.47, "greedy": 0.5},
    }
    write_json_atomic(run.path / "summary.json", {"validation": validation})
    return run


def make_pool(path: Path, spec: Spec) -> RunDir:
    model = path / "policy-small"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "model.safetensors").write_bytes(b"weights")
    rows = [
        {
            "prompt": [
                {"role": "system", "content": "Work step by step."},
                {"role": "user", "content": f"Make {i} from 3, 4 and 5. {spec.hostile}"},
            ],
            "data_source": f"countdown{spec.hostile}",
        }
        for i in range(spec.prompts)
    ]
    pool = path / "pool.jsonl"
    pool.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    return RunDir.create(path / "run", pool, model, answers_kind="exact")


def score_run(run: RunDir, spec: Spec, rng: np.random.Generator) -> dict[str, str]:
    """Scores and traces; returns the true answer of every prompt."""
    names = ("pivot_density", "pivot_count", "entropy", "consistency", "length", "random")
    pool = run.pool()
    truth = {prompt.pt_id: f"{i}{spec.hostile}" for i, prompt in enumerate(pool)}
    rows, traces, texts = [], {}, {}
    detector = DetectorConfig()
    for i, prompt in enumerate(pool):
        hard = rng.uniform()
        right = int(rng.binomial(8, np.clip(1.25 - 1.3 * hard, 0, 1)))
        wrong = 8 - right
        answers = [(truth[prompt.pt_id], right), (f"wrong{spec.hostile}", wrong)]
        answers = sorted([a for a in answers if a[1]], key=lambda a: (-a[1], a[0]))
        values = {name: float(rng.normal()) for name in names}
        values[spec.best] = float(hard + 0.08 * rng.normal())
        if not spec.pivots_informative:
            values["pivot_count"] = 2.0
        values["entropy"] = values["entropy"] if spec.best == "entropy" else float(0.4 * hard)
        if spec.best != "entropy":
            values["entropy"] += float(0.3 * rng.normal())
        rollouts = []
        for g in range(8):
            answer = truth[prompt.pt_id] if g < right else f"wrong{spec.hostile}"
            rollouts.append(
                {
                    "seed": g,
                    "answer": answer,
                    "n_tokens": spec.tokens,
                    "truncated": False,
                    "pivots": 3,
                    "pivot_density": 0.03,
                    "entropy": 0.4,
                    "traced": True,
                }
            )
            if i < 16 and g < 2:
                key = f"{prompt.pt_id}/{g}"
                traces[key] = make_trace(rng, spec.tokens, 1 + int(8 * hard))
                traces[f"{key}/token_entropy"] = np.zeros(spec.tokens, dtype=np.float32)
                tokens = [f" {WORDS[t % len(WORDS)]}" for t in range(spec.tokens)]
                tokens[9::22] = ["\n"] * len(tokens[9::22])
                tokens[3] = spec.hostile or tokens[3]
                texts[key] = {"tokens": tokens, "seed": g, "answer": answer}
        values |= {name: math.nan for name in ESTIMATORS if name not in values}
        rows.append(
            score_row(
                prompt.pt_id,
                answers,
                length_mean=float(60 + 40 * hard + 20 * rng.normal()),
                **{f"uncertainty/{name}": value for name, value in values.items()},
                rollouts=rollouts,
            )
        )
    stats = [trace for trace in traces.values() if trace.ndim == 4]
    detector = replace(detector, tau=calibrate_tau(stats, detector))
    assert any(len(find_pivots(trace, detector)) for trace in stats)
    run.update_manifest(detector=detector.to_dict(), settings={"score": {"seed": 0}})
    run.write_score_part(0, rows)
    run.merge_scores()
    folder = run.path / "traces"
    folder.mkdir()
    save_file(traces, folder / "part-00000.safetensors")
    write_json_atomic(folder / "part-00000.json", texts)
    return truth


def buy_probes(run: RunDir, truth: dict[str, str]) -> None:
    u = uncertainty(run.scores(), "pivot_count")
    ids = choose_probes(list(u.values()), list(u), 48, seed=0)
    run.write_probes("pivot_count", 0, ids)
    buy(run, ids, truth, "probe")


def buy(run: RunDir, ids: list[str], truth: dict[str, str], purpose: str) -> None:
    who = {"annotator": "oracle", "source_file": "queue.csv", "purpose": purpose}
    run.ledger().append({"pt_id": i, "label": truth[i], **who} for i in ids)


def write_metrics(run: RunDir, spec: Spec, rng: np.random.Generator) -> None:
    lines = []
    for step in range(31):
        rise = step / 30
        data: dict[str, Any] = {}
        if step % 10 == 0:
            data[f"val-core/countdown{spec.hostile}/acc/mean@4"] = 0.31 + 0.16 * rise
        if step:
            for route in ("annotate", "self_train"):
                mixed = float(0.45 + 0.1 * np.sin(step + len(route)))
                right = float(0.2 + 0.2 * rise)
                data |= {
                    f"pivottrace/{route}/reward": float(0.3 + 0.3 * rise + 0.05 * rng.normal()),
                    f"pivottrace/{route}/mixed": mixed,
                    f"pivottrace/{route}/all_right": right,
                    f"pivottrace/{route}/all_wrong": 1 - mixed - right,
                    f"pivottrace/{route}/pivot_density": float(0.05 - 0.001 * len(route) * rise),
                }
            data["pivottrace/self_train/agreement"] = 0.6 + 0.2 * rise
            data["pivottrace/self_train/pseudo_label_accuracy"] = 0.8
            data["pivottrace/capture/missed"] = 0.0
        kept = {name: v for name, v in data.items() if not name.endswith(spec.drop_keys or ("\0",))}
        lines.append(json.dumps({"step": step, "data": kept}))
    (run.path / "train").mkdir()
    (run.path / "train" / "metrics.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., RunDir]:
    """make(upto=..., ...) -> a run directory of that `Spec`."""
    return lambda **fields: make_run(tmp_path / f"{len(list(tmp_path.iterdir()))}", Spec(**fields))
