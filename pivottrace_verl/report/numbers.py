"""Everything the report says, as one JSON-able dictionary: report.json, and the template's input.

Contract: numbers come from the run's files only; labels from the ledger only. A number that does
not exist is None, a part that is not there yet is empty, and `missing` says in a sentence why.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pivottrace_verl.answers import correct
from pivottrace_verl.pivots import DetectorConfig
from pivottrace_verl.pool import RunDir
from pivottrace_verl.report import heatmap, stages, verdict
from pivottrace_verl.report.charts import ROUTES
from pivottrace_verl.report.learning import Learning, read_metrics

METHOD = (
    "An implementation from the abstract of arXiv 2606.04503 and the authors' later summary; the "
    "detector's details are our choice."
)

NOT_TRIAGED = "Curve, thresholds, score table: computed for this page from scores and probe labels."

PROVENANCE = (
    "Pool size: manifest.json; equal prompts are one prompt.",
    "Labels bought, cost: ledger.jsonl, probes included. No other label is read.",
    "Routes, uncertainty, reasons: plan.parquet.",
    "Pass rates and right majorities: the answers in scores.parquet against the probes' labels.",
    "Tokens, signal, changes, pivots: traces/, under the detector frozen in manifest.json.",
    "Training curves: train/metrics.jsonl.",
)


@dataclass(frozen=True)
class ExampleView:
    """One example rollout: its numbers, and the prompt and trace that the page draws."""

    numbers: dict[str, Any]
    prompt: list[dict[str, str]]
    trace: heatmap.TracedRollout


@dataclass(frozen=True)
class Report:
    """`numbers` is report.json; the rest is what only the page draws."""

    numbers: dict[str, Any]
    examples: list[ExampleView]
    learning: Learning
    tau: float | None


def collect(run: RunDir, now: datetime) -> Report:
    """Read the run directory at whatever stage it is."""
    manifest = run.manifest
    learning = read_metrics(run.path / "train" / "metrics.jsonl")
    view = verdict.probe_view(run, manifest)
    labels = stages.label_counts(run, manifest["pool"]["n_prompts"])
    refused = bool(view["refused"]) and not view["triaged"]
    stage_list = stages.stage_list(run, manifest, learning, refused=refused)
    outcome = stages.result(run.path, learning)
    detector = DetectorConfig.from_dict(manifest["detector"]) if "detector" in manifest else None
    examples, traced = _examples(run, manifest, view, detector)
    curve = view["curve"] or {}
    triaged = "Curve, thresholds, score table: triage.json."
    provenance = [*PROVENANCE, triaged if view["triaged"] else NOT_TRIAGED]
    if outcome is not None:
        provenance.append(f"Validation before and after: {outcome['source']}.")
    numbers = {
        "format": 1,
        "run": run.path.resolve().name,
        "written": now.strftime("%Y-%m-%d %H:%M %Z").strip(),
        "headline": stages.headline(stage_list, labels, outcome),
        "pool": manifest["pool"],
        "model": {
            "name": Path(manifest["model"]["path"]).name,
            "fingerprint": manifest["model"]["fingerprint"],
        },
        "labels": labels,
        "result": outcome,
        "stages": stage_list,
        "routes": _routes(run, view),
        "calibration": {
            **{key: view[key] for key in ("refused", "best", "estimator", "direction", "spearman")},
            "triaged": view["triaged"],
            "config": view["config"],
            "u_low": curve.get("u_low"),
            "u_high": curve.get("u_high"),
            "curve": view["curve"],
            "probes": view["probes"],
            "settings_line": verdict.settings_line(view),
        },
        "estimators": verdict.contest(view),
        "detector": detector.to_dict() if detector else None,
        "detector_line": _detector_line(detector),
        "traced_prompts": traced,
        "examples": [example.numbers for example in examples],
        "learning": {
            "steps": learning.steps,
            "torn_lines": learning.torn,
            "series": {
                name: points
                for name, points in sorted(learning.series.items())
                if name.startswith(("pivottrace/", "val-core/"))
            },
        },
        "missing": _missing(detector, refused=refused),
        "method": METHOD,
        "provenance": provenance,
        "manifest": manifest,
    }
    tau = detector.tau if detector else None
    return Report(finite(numbers), examples, learning, tau)


def finite(value: Any) -> Any:
    """The same with NaN and infinities as None, tuples as lists and keys as text."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def settings(numbers: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The manifest and triage's settings as (dotted key, text) lines; long lists are shortened."""
    source = {**numbers["manifest"], "triage": numbers["calibration"]["config"]}
    out: list[tuple[str, str]] = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key in value:
                walk(f"{prefix}.{key}" if prefix else str(key), value[key])
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            out.append((prefix, text if len(text) <= 300 else f"{text[:300]}…"))

    walk("", source)
    return out


def _routes(run: RunDir, view: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a route, easy to hard; empty before triage.

    Probes are counted by the route that the thresholds give their place: a bought label sends a
    prompt to annotate wherever it lies.
    """
    if not view["triaged"]:
        return []
    plan = run.plan().to_pylist()
    labels = run.ledger().labels()
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    bought: Counter[str] = Counter()
    for row in plan:
        reasons[row["route"]][row["reason"]] += 1
        bought[row["route"]] += row["pt_id"] in labels
    rates: dict[str, list[float]] = defaultdict(list)
    for probe in view["probes"]:
        rates[verdict.zone(probe["u"], view["curve"])].append(probe["pass_rate"])
    out = []
    for route in ROUTES:
        count = reasons[route].total()
        rate = rates[route]
        out.append(
            {
                "route": route,
                "count": count,
                "share": count / len(plan) if plan else 0.0,
                "labels": bought[route],
                "probes": len(rate),
                "pass_rate": sum(rate) / len(rate) if rate else None,
                "reasons": [
                    {"reason": reason, "count": n} for reason, n in reasons[route].most_common()
                ],
            }
        )
    return out


def _examples(
    run: RunDir,
    manifest: Mapping[str, Any],
    view: Mapping[str, Any],
    detector: DetectorConfig | None,
) -> tuple[list[ExampleView], int]:
    """The examples, and the number of prompts whose traces were kept."""
    index = heatmap.trace_index(run.path / "traces")
    if detector is None or detector.tau is None or not index:
        return [], len(index)
    u = verdict.ranking(run, view)
    traced = {pt_id: u[pt_id] for pt_id in index if pt_id in u}
    if not traced:
        return [], len(index)
    prompts = {prompt.pt_id: prompt for prompt in run.pool()}
    rows = run.scores(rollouts=False).select(["pt_id", "majority", "n_rollouts"]).to_pylist()
    scores = {row["pt_id"]: row for row in rows if row["pt_id"] in traced}
    plan = run.plan().to_pylist() if view["triaged"] else []
    routes = {row["pt_id"]: row["route"] for row in plan}
    labels = run.ledger().labels()
    out = []
    for pt_id, band in heatmap.choose(traced):
        trace = heatmap.median_rollout(pt_id, index[pt_id], detector)
        majority = scores[pt_id]["majority"]
        label = labels.get(pt_id)
        numbers = {
            "pt_id": pt_id,
            "rollout": trace.rollout,
            "seed": trace.seed,
            "band": band,
            "uncertainty": u[pt_id],
            "route": routes.get(pt_id),
            "data_source": prompts[pt_id].data_source,
            "answer": trace.answer,
            "majority": majority,
            "n_rollouts": scores[pt_id]["n_rollouts"],
            "majority_right": None
            if label is None
            else correct(majority, label, manifest["answers"]["kind"]),
            "tokens": len(trace.tokens),
            "pivots": trace.pivots,
            "density": trace.density,
        }
        out.append(ExampleView(numbers, prompts[pt_id].messages, trace))
    return out, len(index)


def _detector_line(detector: DetectorConfig | None) -> str:
    if detector is None or detector.tau is None:
        return ""
    change = "the size of the change" if detector.change == "abs" else "the rise"
    return (
        f"Shading: {change} of {detector.signal} from token to token. A pivot is underlined: a "
        f"change of at least τ = {detector.tau:.4f} (the {detector.tau_quantile:g} quantile of the "
        f"calibration rollouts), the largest within {detector.refractory} tokens."
    )


def _missing(detector: DetectorConfig | None, *, refused: bool) -> dict[str, str]:
    """Why a part is empty, if it is."""
    done = "refuses this ranking" if refused else "is not done yet"
    examples = "No traces are kept in this run, so there is no rollout to show."
    if detector is None or detector.tau is None:
        examples = (
            "The detector is not calibrated: the pool is not scored yet, or without traces, so "
            "there are no pivots to show."
        )
    return {
        "routes": f"Triage {done}, so no prompt has a route.",
        "estimators": "No probe has a label yet, so the scores cannot be compared.",
        "examples": examples,
        "learning": "Training is not done yet, so there is no learning curve.",
    }
