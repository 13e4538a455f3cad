"""Triage: every prompt of the pool gets one of three routes.

Contract: the probes decide direction and thresholds. u <= u_low is mastered: drop. u >= u_high:
votes cannot be trusted: annotate. Between: self_train. A ranking the probes do not confirm is
refused (`Uninformative`), naming the estimator that would serve. The plan depends on scores,
probe outcomes and on which prompts have a label, never on a label itself otherwise.

    plan = triage(scores, outcomes(scores, labels, kind), ledger.purposes(), TriageConfig())
    run.write_plan(plan.rows, plan.info())

Axes: P prompts, N probes.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from pivottrace_verl.calibration import (
    PREFIX,
    Curve,
    Outcome,
    calibrate,
    choose_probes,
    default_probes,
    estimator_table,
    outcomes,
    rank01,
    rows_of,
)
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.plan import (
    AUTO,
    LABELLED,
    MASTERED,
    MASTERED_LABELLED,
    NOT_TRUSTED,
    OVER_BUDGET,
    TRUSTED,
    UNKNOWN,
    Plan,
    TriageConfig,
)

__all__ = [
    "Curve",
    "Outcome",
    "Plan",
    "TriageConfig",
    "Uninformative",
    "calibrate",
    "choose_probes",
    "default_probes",
    "estimator_table",
    "outcomes",
    "rank01",
    "triage",
    "uncertainty",
]

FEWEST_PROBES = 8


class Uninformative(PivotTraceError):
    """The ranking says nothing about where the policy fails."""

    def __init__(self, message: str, best: str | None, table: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.best = best
        """The estimator that would serve; None if none does."""
        self.table = table
        """`estimator_table` of the probes."""


def uncertainty(scores: Any, estimator: str, direction: str = "higher") -> dict[str, float]:
    """pt_id -> rank in [0, 1] by one estimator. PivotTraceError if the scores do not have it."""
    rows = _columns(scores, estimator)
    sign = 1.0 if direction == "higher" else -1.0
    values = [
        math.nan if v is None else sign * v for v in (row[PREFIX + estimator] for row in rows)
    ]
    ids = [row["pt_id"] for row in rows]
    return dict(zip(ids, rank01(values, ids).tolist(), strict=True))


def _columns(scores: Any, estimator: str) -> Sequence[Any]:
    rows = rows_of(scores)
    names = [n.removeprefix(PREFIX) for n in (rows[0] if rows else {}) if n.startswith(PREFIX)]
    if estimator not in names:
        raise PivotTraceError(
            f"The scores have no estimator '{estimator}', only {', '.join(names) or 'none'}."
        )
    return rows


def triage(
    scores: Any, probes: Sequence[Outcome], labelled: Collection[str], cfg: TriageConfig
) -> Plan:
    """Route every scored prompt.

    `probes` are the outcomes of the labels bought as probes (others were not drawn over the
    whole ranking and would bend the curve); `labelled` are all prompts with a label, which count
    against the budget. Raises Uninformative if the ranking is not confirmed, PivotTraceError if
    there are fewer than 8 probes or the estimator is unknown.
    """
    rows = rows_of(scores)
    if len(probes) < FEWEST_PROBES:
        raise PivotTraceError(
            f"Only {len(probes)} probes are labelled, but at least {FEWEST_PROBES} are needed to "
            "calibrate a ranking."
        )
    table = estimator_table(rows, probes)
    estimator, direction, rho = _choose(table, probes, cfg)
    u = uncertainty(rows, estimator, direction)
    known = {row["pt_id"] for row in rows if not _unknown(row[PREFIX + estimator])}
    seen = [outcome for outcome in probes if outcome.pt_id in known]
    curve = calibrate(
        [u[outcome.pt_id] for outcome in seen],
        [outcome.pass_rate for outcome in seen],
        [outcome.majority_right for outcome in seen],
        mastered=cfg.mastered,
        trusted=cfg.trusted,
        window=cfg.window,
    )
    owned = set(labelled) & set(u)
    ranking = sorted(u, key=lambda pt_id: (-u[pt_id], pt_id))
    left = math.inf if cfg.budget is None else max(0, cfg.budget - len(owned))
    routed: dict[str, dict[str, Any]] = {}
    for rank, pt_id in enumerate(ranking, start=1):
        route, reason = _route(u[pt_id], curve, pt_id in owned, pt_id in known)
        if reason in (NOT_TRUSTED, UNKNOWN):
            if left > 0:
                left -= 1
            else:
                route, reason = cfg.overflow, OVER_BUDGET
        routed[pt_id] = {
            "pt_id": pt_id,
            "route": route,
            "uncertainty": u[pt_id],
            "rank": rank,
            "reason": reason,
        }
    reasons = Counter(row["reason"] for row in routed.values())
    return Plan(
        rows=[routed[row["pt_id"]] for row in rows],
        estimator=estimator,
        direction=direction,
        spearman=rho,
        curve=curve,
        table=table,
        labels={
            "budget": cfg.budget,
            "bought": len(owned),
            "to_buy": reasons[NOT_TRUSTED] + reasons[UNKNOWN],
            "over_budget": reasons[OVER_BUDGET],
        },
        config=cfg,
    )


def _route(u: float, curve: Curve, owned: bool, known: bool) -> tuple[str, str]:
    """(route, reason) before the budget is looked at."""
    mistrusted = curve.u_high is not None and u >= curve.u_high
    # Where both thresholds meet, mistrust wins.
    if known and curve.u_low is not None and u <= curve.u_low and not mistrusted:
        return "drop", MASTERED_LABELLED if owned else MASTERED
    if owned:
        return "annotate", LABELLED
    if not known:
        return "annotate", UNKNOWN
    return ("annotate", NOT_TRUSTED) if mistrusted else ("self_train", TRUSTED)


def _unknown(value: float | None) -> bool:
    return value is None or bool(np.isnan(value))


def _choose(
    table: list[dict[str, Any]], probes: Sequence[Outcome], cfg: TriageConfig
) -> tuple[str, str, float]:
    """(estimator, direction, its Spearman in that direction), or Uninformative."""
    rates = {outcome.pass_rate for outcome in probes}
    if len(rates) == 1:
        raise Uninformative(
            f"All {len(probes)} probes have the same pass rate, {rates.pop():.2f}, so no ranking "
            "can be calibrated on them.",
            None,
            table,
        )
    # Random may follow 64 probes by chance; it serves nobody.
    serving = [
        row
        for row in table
        if row["estimator"] != "random" and abs(row["spearman"] or 0.0) >= cfg.min_spearman
    ]
    best = serving[0] if serving else None
    advice = "no estimator in the scores does better."
    if best is not None:
        advice = (
            f"use '{best['estimator']}' (Spearman {best['spearman']:+.2f}, direction "
            f"{best['direction']}) instead."
        )
    name = cfg.estimator
    if name == AUTO:
        if best is None:
            raise Uninformative(
                f"No estimator follows the pass rates of the {len(probes)} probes: all Spearman "
                f"correlations are below {cfg.min_spearman:.2f} in size.",
                None,
                table,
            )
        name = best["estimator"]
    row = next((row for row in table if row["estimator"] == name), None)
    if row is None:
        names = ", ".join(row["estimator"] for row in table)
        raise PivotTraceError(f"The scores have no estimator '{name}', only {names}.")
    direction = cfg.direction if cfg.direction != AUTO else (row["direction"] or "higher")
    rho = (row["spearman"] or 0.0) * (1.0 if direction == "higher" else -1.0)
    if rho > -cfg.min_spearman:
        raise Uninformative(
            f"The estimator '{name}' (direction {direction}) does not tell where the policy fails: "
            f"its Spearman correlation with the pass rate of the {len(probes)} probes is "
            f"{rho:+.2f}, but must be at most {-cfg.min_spearman:.2f}; {advice}",
            None if best is None else best["estimator"],
            table,
        )
    return name, direction, rho
