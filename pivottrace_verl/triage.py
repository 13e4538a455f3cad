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

from pivottrace_verl.calibration import (
    Curve,
    Outcome,
    calibrate,
    choose_probes,
    default_probes,
    outcomes,
    rank01,
    rows_of,
)
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.plan import (
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
from pivottrace_verl.ranking import Uninformative, estimator_table, rank_pool, uncertainty

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
    ranking = rank_pool(rows, probes, cfg)
    ids = [row["pt_id"] for row in rows]
    u = dict(zip(ids, rank01(ranking.values, ids).tolist(), strict=True))
    known = {i for i, value in zip(ids, ranking.values, strict=True) if not math.isnan(value)}
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
    order = sorted(u, key=lambda pt_id: (-u[pt_id], pt_id))
    routes = {i: _route(u[i], curve, i in owned, i in known) for i in order}
    wanted = [i for i in order if routes[i][1] in (NOT_TRUSTED, UNKNOWN)]
    afforded = len(wanted) if cfg.budget is None else max(0, cfg.budget - len(owned))
    # `wanted` runs from the most uncertain prompt down to the threshold.
    if cfg.priority == "threshold":
        wanted.reverse()
    for pt_id in wanted[afforded:]:
        routes[pt_id] = cfg.overflow, OVER_BUDGET
    routed: dict[str, dict[str, Any]] = {}
    for rank, pt_id in enumerate(order, start=1):
        route, reason = routes[pt_id]
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
        estimator=ranking.estimator,
        direction=ranking.direction,
        spearman=ranking.spearman,
        curve=curve,
        table=ranking.table,
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
