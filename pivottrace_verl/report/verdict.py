"""What the probes say: the calibration curve and which score points best at wrong majorities.

Contract: only the labels of the probes drawn are used. After triage the numbers are those of
triage.json and plan.parquet; before it, or when it refused, they are computed here by the same
functions, and marked so. Nothing presumes that pivots win: the sentence is read off the table.
Axes: N probes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from pivottrace_verl.calibration import Outcome, calibrate, outcomes
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.pool import RunDir
from pivottrace_verl.ranking import Uninformative, estimator_table, uncertainty
from pivottrace_verl.triage import TriageConfig, judged, triage

FEWEST = 8
"""Labelled probes below which no curve is drawn."""


def probe_view(run: RunDir, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """{probes: [{pt_id, u, pass_rate, majority_right}], curve, table, estimator, direction,
    spearman, config, refused: str | None, best, triaged: bool}; empty where nothing is known.

    `curve` is None with fewer than 8 labelled probes; u is the rank that triage uses.
    """
    view: dict[str, Any] = {
        "probes": [],
        "curve": None,
        "table": [],
        "estimator": None,
        "direction": None,
        "spearman": None,
        "config": None,
        "refused": None,
        "best": None,
        "triaged": (run.path / "plan.parquet").exists(),
    }
    if not (run.path / "scores.parquet").exists():
        return view
    scores = run.scores(rollouts=False)
    labels = run.ledger().labels()
    drawn = set(run.probes()["pt_ids"]) if (run.path / "probes.json").exists() else set()
    probed = {pt_id: label for pt_id, label in labels.items() if pt_id in drawn}
    found = outcomes(scores, probed, manifest["answers"]["kind"])
    info = run.triage() if view["triaged"] else {}
    for part in ("curve", "config"):
        if view["triaged"] and not isinstance(info.get(part), dict):
            raise PivotTraceError(f"triage.json in {run.path} has no {part}: triage again.")
    found = _judged(scores, found, info.get("config") or asdict(_planned_config(run, manifest)))
    if view["triaged"]:
        view |= {key: info.get(key) for key in ("curve", "table", "estimator", "direction")}
        view |= {"spearman": info.get("spearman"), "config": info.get("config")}
        view["refused"] = info.get("refused")  # Then another estimator took its place.
        u = {row["pt_id"]: row["uncertainty"] for row in run.plan().to_pylist()}
    elif found:
        view |= _so_far(run, manifest, scores, found, set(labels))
        u = uncertainty(scores, view["estimator"], view["direction"], found)
        if view["curve"] is None and len(found) >= FEWEST:
            rows = [(u[o.pt_id], o.pass_rate, o.majority_right) for o in found]
            config = view["config"]
            at, p, m = zip(*rows, strict=True)
            view["curve"] = asdict(
                calibrate(
                    at,
                    p,
                    m,
                    mastered=config["mastered"],
                    trusted=config["trusted"],
                    window=config["window"],
                )
            )
    view["probes"] = [
        {
            "pt_id": outcome.pt_id,
            "u": float(u[outcome.pt_id]),
            "pass_rate": float(outcome.pass_rate),
            "majority_right": bool(outcome.majority_right),
        }
        for outcome in found
    ]
    return view


def _judged(scores: Any, found: Sequence[Outcome], config: Mapping[str, Any]) -> list[Outcome]:
    """The probes that calibration looks at: without those set apart for review."""
    names = ("max_unanswered", "max_truncated")
    limits = TriageConfig(**{name: config[name] for name in names if name in config})
    return judged(scores, found, limits)


def _so_far(
    run: RunDir,
    manifest: Mapping[str, Any],
    scores: Any,
    found: Sequence[Outcome],
    labelled: set[str],
) -> dict[str, Any]:
    """What triage would say now: its table, direction and refusal, without a plan."""
    config = _planned_config(run, manifest)
    out: dict[str, Any] = {"config": asdict(config), "estimator": config.estimator}
    out["table"] = estimator_table(scores, found)
    rows = {row["estimator"]: row for row in out["table"]}
    try:
        if len(found) >= FEWEST:
            plan = triage(scores, found, labelled, config)
            out |= {"estimator": plan.estimator, "curve": asdict(plan.curve)}
    except Uninformative as refusal:
        out |= {"refused": str(refusal), "best": refusal.best}
    # `auto`, and triage did not choose, or not scored: the table's first.
    if not rows.get(out["estimator"], {"n": 0})["n"]:
        out["estimator"] = out["table"][0]["estimator"]
    row = rows[out["estimator"]]
    direction = config.direction if config.direction != "auto" else row["direction"] or "higher"
    sign = 1.0 if direction == "higher" else -1.0
    rho = row["spearman"]
    return out | {"direction": direction, "spearman": None if rho is None else sign * rho}


def _planned_config(run: RunDir, manifest: Mapping[str, Any]) -> TriageConfig:
    """The settings of triage before it is done: the manifest's, else the defaults with the
    estimator that the probes were drawn by."""
    known = {field.name for field in fields(TriageConfig)}
    settings = manifest.get("settings", {}).get("triage", {})
    chosen = {name: value for name, value in settings.items() if name in known}
    if "estimator" not in chosen and (run.path / "probes.json").exists():
        chosen["estimator"] = run.probes()["estimator"]
    return TriageConfig(**chosen)


def ranking(run: RunDir, view: Mapping[str, Any]) -> dict[str, float]:
    """pt_id -> u of the whole pool: the plan's, else by the score the probes speak for, else by
    pivot_count. Empty before scoring."""
    if view["triaged"]:
        return {row["pt_id"]: float(row["uncertainty"]) for row in run.plan().to_pylist()}
    if not (run.path / "scores.parquet").exists():
        return {}
    estimator, direction = view["estimator"] or "pivot_count", view["direction"] or "higher"
    probes = [Outcome(p["pt_id"], p["pass_rate"], p["majority_right"]) for p in view["probes"]]
    return uncertainty(run.scores(rollouts=False), estimator, direction, probes)


def zone(u: float, curve: Mapping[str, Any] | None) -> str:
    """The route that the thresholds alone give to place u."""
    low, high = (curve or {}).get("u_low"), (curve or {}).get("u_high")
    if high is not None and u >= high:
        return "annotate"
    return "drop" if low is not None and u <= low else "self_train"


def contest(view: Mapping[str, Any]) -> dict[str, Any]:
    """{rows, winners, pivots_best, sentence, note}: the estimator table with its winner.

    Each AUROC is turned into the direction the probes give that score, so 0.5 is a coin toss and
    more is better; the best of them wins, equal ones share it.
    """
    rows = []
    for row in view["table"]:
        lower = row["direction"] == "lower"
        auroc, within = row["auroc"], row["auroc_within_length"]
        rows.append(
            {
                "name": row["estimator"],
                "auroc": 1 - auroc if lower and auroc is not None else auroc,
                "auroc_within_length": 1 - within if lower and within is not None else within,
                "spearman": row["spearman"],
                "direction": row["direction"] or "–",
                "n": row["n"],
                "winner": False,
                "used": row["estimator"] == view["estimator"] and view["triaged"],
            }
        )
    rows.sort(key=lambda row: (-(row["auroc"] if row["auroc"] is not None else -1), row["name"]))
    best = max((row["auroc"] for row in rows if row["auroc"] is not None), default=None)
    for row in rows:
        row["winner"] = best is not None and row["auroc"] is not None and row["auroc"] > best - 1e-9
    winners = [row["name"] for row in rows if row["winner"]]
    pivots = [row for row in rows if row["name"].startswith("pivot") and row["auroc"] is not None]
    return {
        "rows": rows,
        "winners": winners,
        "pivots_best": bool(winners) and all(name.startswith("pivot") for name in winners),
        "sentence": _sentence(rows, winners, pivots),
        "note": _note(view, best),
    }


def _sentence(rows: list[dict[str, Any]], winners: list[str], pivots: list[dict[str, Any]]) -> str:
    if not winners:
        return "The probes cannot tell the scores apart: all majorities are right, or all wrong."
    best = next(row["auroc"] for row in rows if row["winner"])
    others = [row for row in rows if not row["name"].startswith("pivot") and row["auroc"]]
    if not pivots:
        return f"Pivots were not scored; {' and '.join(winners)} is the best here ({best:.3f})."
    if all(name.startswith("pivot") for name in winners):
        then = f", then {others[0]['name']} ({others[0]['auroc']:.3f})" if others else ""
        return f"Pivots are the best here: {' and '.join(winners)} ({best:.3f}){then}."
    rest = [name for name in winners if not name.startswith("pivot")]
    if len(rest) < len(winners):
        return f"Pivots share the best place here with {' and '.join(rest)} ({best:.3f})."
    return (
        f"Pivots are not the best here: {' and '.join(winners)} ({best:.3f}) against "
        f"{pivots[0]['name']} ({pivots[0]['auroc']:.3f})."
    )


def _note(view: Mapping[str, Any], best: float | None) -> str:
    n = len(view["probes"])
    wrong = sum(not probe["majority_right"] for probe in view["probes"])
    text = (
        f"On {n} probes, {wrong} with a wrong majority answer (no majority counts as wrong). 0.5 "
        "is a coin toss. Each score is read in the direction that the same probes give it, which "
        "flatters weak scores a little."
    )
    if best is not None and 0 < wrong < n:
        error = standard_error(best, wrong, n - wrong)
        text += f" The best one's standard error is about {error:.2f}."
    return text


def standard_error(auroc: float, positives: int, negatives: int) -> float:
    """Of an AUROC, after Hanley and McNeil (1982)."""
    q1, q2 = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    variance = auroc * (1 - auroc)
    variance += (positives - 1) * (q1 - auroc**2) + (negatives - 1) * (q2 - auroc**2)
    return math.sqrt(max(variance, 0.0) / (positives * negatives))


def settings_line(view: Mapping[str, Any]) -> str:
    """What the curve was made with, in one or two sentences; empty without a curve."""
    curve, config = view["curve"], view["config"]
    if not curve or not config:
        return ""
    rho = "undefined" if view["spearman"] is None else f"{view['spearman']:+.2f}"
    text = (
        f"Ranked by {view['estimator']} ({view['direction']} = less sure); Spearman of u with the "
        f"pass rate {rho}. Sliding mean over {curve['window']} of {curve['probes']} probes; the "
        f"thresholds lie where its monotone fit crosses {config['mastered']:g} (mastered) and "
        f"{config['trusted']:g} (votes trusted)."
    )
    if not view["triaged"]:
        text += " Computed for this page: triage has not gone through."
    return text
