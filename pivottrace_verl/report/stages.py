"""How far the run is, what it bought and what training gave: the report's first screen as numbers.

Contract: read-only; a stage that is not done is named as not done, never an error.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.files import read_object
from pivottrace_verl.pool import RunDir
from pivottrace_verl.report.learning import Learning


def label_counts(run: RunDir, n_prompts: int) -> dict[str, Any]:
    """Labels bought, by purpose, and their share of the pool. They are the ledger's, no others."""
    ledger = run.ledger()
    purposes = list(ledger.purposes().values())
    return {
        "total": len(purposes),
        "probe": purposes.count("probe"),
        "annotate": purposes.count("annotate"),
        "share": len(purposes) / n_prompts if n_prompts else 0.0,
        "cost": ledger.spent(),
        "torn_lines": len(ledger.torn),
    }


def stage_list(
    run: RunDir, manifest: Mapping[str, Any], learning: Learning, *, refused: bool
) -> list[dict[str, Any]]:
    """[{name, done, detail, seconds}] of score, probe, triage, annotate and train, in order.

    `refused`: triage does not go through on these probes.
    """
    path = run.path
    timings = manifest.get("timings", {})
    labels = run.ledger().labels()
    out: list[dict[str, Any]] = []

    def add(name: str, done: bool, detail: str) -> None:
        seconds = timings.get(name)
        seconds = float(seconds) if isinstance(seconds, int | float) else None
        out.append({"name": name, "done": done, "detail": detail, "seconds": seconds})

    scored = (path / "scores.parquet").exists()
    parts = len(run.finished_parts())
    begun = f"not done yet, {parts} parts written" if parts else "not done yet"
    add("score", scored, f"{manifest['pool']['n_prompts']} prompts" if scored else begun)

    probes = run.probes()["pt_ids"] if (path / "probes.json").exists() else []
    bought = sum(pt_id in labels for pt_id in probes)
    detail = f"{bought} of {len(probes)} labels" if probes else "not done yet"
    add("probe", bool(probes) and bought == len(probes), detail)

    planned = (path / "plan.parquet").exists()
    detail = "refuses this ranking" if refused else "not done yet"
    rows = run.plan().select(["pt_id", "route"]).to_pylist() if planned else []
    if planned:
        apart = sum(row["route"] == "review" for row in rows)
        detail = "every prompt has a route" + (f", {apart} to review" if apart else "")
    add("triage", planned, detail)

    wanted = [row["pt_id"] for row in rows if row["route"] == "annotate"]
    have = sum(pt_id in labels for pt_id in wanted)
    detail = f"{have} of {len(wanted)} labels" if planned else "not done yet"
    add("annotate", planned and have == len(wanted), detail)

    steps = learning.steps
    add("train", steps > 0, f"{steps} steps" if steps else "not done yet")
    return out


def result(path: Path, learning: Learning) -> dict[str, Any] | None:
    """Validation accuracy before and after training, {"source", "rows": [{name, before, after}]}.

    Of summary.json, else of validation.json, else the first and last validation that training
    logged, else None.
    """
    for source in ("summary.json", "validation.json"):
        if not (path / source).exists():
            continue
        content = read_object(path / source)
        found = content.get("validation") or {} if source == "summary.json" else content
        rows = _before_and_after(found, path / source)
        if rows:
            return {"source": source, "rows": rows}
    rows = [
        {"name": name.removeprefix("val-core/"), "before": points[0][1], "after": points[-1][1]}
        for name, points in learning.validation().items()
        if len(points) > 1
    ]
    return {"source": "train/metrics.jsonl", "rows": rows} if rows else None


def _before_and_after(found: Any, file: Path) -> list[dict[str, Any]]:
    whens = ("before", "after")
    sides: list[Any] = [found.get(w) or {} for w in whens] if isinstance(found, Mapping) else [None]
    if not all(isinstance(side, Mapping) for side in sides):
        raise PivotTraceError(f"{file} holds no validation before and after training.")
    samples = sides[0].get("samples")
    mean = f"mean of {samples}" if samples else "mean at T=1"
    rows = []
    for key, name in (("mean", mean), ("mean4", "mean of 4"), ("greedy", "greedy")):
        values: list[Any] = [side.get(key) for side in sides]
        if None in values:
            continue
        if not all(isinstance(value, int | float) for value in values):
            raise PivotTraceError(f"{file} holds a {key} that is not a number.")
        rows.append({"name": name, "before": float(values[0]), "after": float(values[1])})
    return rows


def headline(
    stages: list[dict[str, Any]], labels: Mapping[str, Any], outcome: Mapping[str, Any] | None
) -> str:
    """The page's first sentence: the key result, or how far the run is."""
    if outcome is not None:
        row = outcome["rows"][0]
        return (
            f"Validation accuracy ({row['name']}) went from {row['before']:.1%} to "
            f"{row['after']:.1%} with labels for {labels['share']:.1%} of the pool."
        )
    missing = [stage["name"] for stage in stages if not stage["done"]]
    if missing:
        return f"This run is not finished: {', '.join(missing)} not done yet."
    return "Training ran, but no validation accuracy before and after it is recorded."
