"""Triage: every prompt of the pool gets one of four routes.

Contract: the probes decide direction and thresholds. u <= u_low is mastered: drop. u >= u_high:
votes cannot be trusted: annotate. Between: self_train. Broken is not hard: a prompt whose rollouts
are mostly unparseable, timed out or truncated is set apart for review, whatever its rank, and is
neither bought nor trained on nor looked at in calibration. A ranking the probes do not confirm is
refused (`Uninformative`), naming the estimator that would serve. The plan depends on scores,
probe outcomes and on which prompts have a label, never on a label itself otherwise.

    plan = triage(scores, outcomes(scores, labels, kind), ledger.purposes(), TriageConfig())
    run.write_plan(plan.rows, plan.info())

Axes: P prompts, N probes.
"""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from pivottrace_verl.budget import BOUGHT, NO_BUDGET, NO_QUOTA, Market, buy, by_priority
from pivottrace_verl.calibration import (
    Curve,
    Floats,
    Outcome,
    calibrate,
    choose_probes,
    default_probes,
    outcomes,
    rank01,
    table_of,
)
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.plan import (
    LABELLED,
    MASTERED,
    MASTERED_LABELLED,
    NOT_TRUSTED,
    OVER_BUDGET,
    OVER_BUDGET_UNKNOWN,
    OVER_QUOTA,
    OVER_QUOTA_UNKNOWN,
    ROUTE_OF,
    TIMED_OUT,
    TO_BUY,
    TRUNCATED,
    TRUSTED,
    UNKNOWN,
    UNPARSEABLE,
    Plan,
    TriageConfig,
)
from pivottrace_verl.ranking import Uninformative, estimator_table, rank_pool, uncertainty
from pivottrace_verl.schemas import PLAN_SCHEMA

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
    "judged",
    "outcomes",
    "rank01",
    "sound",
    "too_few",
    "triage",
    "uncertainty",
]

FEWEST_PROBES = 8
_REASONS = tuple(ROUTE_OF)
_CODE = {reason: code for code, reason in enumerate(_REASONS)}
Codes = NDArray[np.int8]


def sound(scores: Any, cfg: TriageConfig) -> NDArray[np.bool_]:
    """[P] whether a prompt's rollouts can be judged: False for those set apart as `review`."""
    return _broken(table_of(scores), cfg) < 0


def judged(scores: Any, probes: Sequence[Outcome], cfg: TriageConfig) -> list[Outcome]:
    """The probes that calibration looks at: those not set apart as `review`."""
    table = table_of(scores)
    ids = pa.array([probe.pt_id for probe in probes], pa.string())
    table = table.filter(pc.is_in(table["pt_id"], value_set=ids))
    kept = set(table["pt_id"].filter(pa.array(sound(table, cfg))).to_pylist())
    return [probe for probe in probes if probe.pt_id in kept]


def too_few(n: int, set_apart: int) -> PivotTraceError:
    """That `n` probes beside those set apart are fewer than `FEWEST_PROBES`."""
    return PivotTraceError(
        f"Only {n} probes are labelled"
        + (f" beside {set_apart} whose rollouts are broken" if set_apart else "")
        + f", but at least {FEWEST_PROBES} are needed to calibrate a ranking."
    )


def triage(
    scores: Any,
    probes: Sequence[Outcome],
    labelled: Collection[str],
    cfg: TriageConfig,
    *,
    sources: Any = None,
    costs: ArrayLike | None = None,
    spent: float | None = None,
) -> Plan:
    """Route every scored prompt.

    `probes` are the outcomes of the labels bought as probes (others were not drawn over the
    whole ranking and would bend the curve); `labelled` are all prompts with a label, which count
    against the budget. `sources` [P] are the prompts' data sources, needed for quotas and floors;
    `costs` [P] the costs of their labels, 1.0 each by default; `spent` the cost of the labels
    bought so far, by default what `costs` says of them.

    Raises Uninformative if the ranking is not confirmed, PivotTraceError if there are fewer than
    8 probes that are not broken, the estimator is unknown, or the budget cannot be kept.
    """
    table = table_of(scores)
    ids = _array(table["pt_id"])
    reason = _broken(table, cfg)
    is_broken = reason >= 0
    at = pc.index_in(pa.array([probe.pt_id for probe in probes], pa.string()), value_set=ids)
    place = np.asarray(at.fill_null(-1), dtype=np.intp)
    kept = [i for i, where in enumerate(place.tolist()) if where >= 0 and not is_broken[where]]
    set_apart = len(probes) - len(kept)
    if len(kept) < FEWEST_PROBES:
        raise too_few(len(kept), set_apart)
    ranking = rank_pool(table, [probes[i] for i in kept], cfg)
    known = ~np.isnan(ranking.values)
    u = rank01(ranking.values, ids)
    curve = _curve([(u[place[i]], probes[i]) for i in kept if known[place[i]]], cfg)

    owned = np.asarray(pc.is_in(ids, value_set=pa.array(list(labelled), pa.string())))
    reason = np.where(is_broken, reason, _reasons(u, known, owned, curve))
    cost = np.ones(len(ids)) if costs is None else np.asarray(costs, dtype=np.float64)
    market = _market(cost, sources, owned, float(cost[owned].sum()) if spent is None else spent)
    wanted = np.flatnonzero(np.isin(reason, [_CODE[name] for name in TO_BUY]))
    wanted = by_priority(wanted, u, ids, cost, cfg)
    purchase = buy(wanted, market, cfg)
    for fate, name, unknown in (
        (NO_BUDGET, OVER_BUDGET, OVER_BUDGET_UNKNOWN),
        (NO_QUOTA, OVER_QUOTA, OVER_QUOTA_UNKNOWN),
    ):
        left_out = wanted[purchase.fate == fate]
        reason[left_out] = np.where(known[left_out], _CODE[name], _CODE[unknown])
    to_buy = wanted[purchase.fate == BOUGHT]
    return Plan(
        rows=_rows(ids, reason, u, cost, cfg),
        estimator=ranking.estimator,
        direction=ranking.direction,
        spearman=ranking.spearman,
        curve=curve,
        table=ranking.table,
        labels={
            "budget": cfg.budget,
            "budget_cost": cfg.budget_cost,
            "bought": int(owned.sum()),
            "spent": market.spent,
            "to_buy": len(to_buy),
            "cost_to_buy": float(cost[to_buy].sum()),
            "over_budget": int((purchase.fate == NO_BUDGET).sum()),
            "over_quota": int((purchase.fate == NO_QUOTA).sum()),
            "probes_in_review": set_apart,
        },
        sources=purchase.sources,
        notes=purchase.notes,
        config=cfg,
    )


def _broken(table: pa.Table, cfg: TriageConfig) -> Codes:
    """[P] the reason's code where the rollouts cannot be judged, else -1.

    A cut-off text is named before what follows from it: that no answer could be read.
    """
    n: Floats = np.maximum(np.asarray(table["n_rollouts"], dtype=np.float64), 1)

    def share(name: str) -> Floats:
        count: Floats = np.asarray(table[name], dtype=np.float64)
        return count / n

    truncated, unparseable, timed_out = map(share, ("truncated", "unparseable", "timed_out"))
    unanswered = unparseable + timed_out > cfg.max_unanswered
    return np.select(
        [
            truncated > cfg.max_truncated,
            unanswered & (unparseable >= timed_out),
            unanswered,
        ],
        [np.int8(_CODE[name]) for name in (TRUNCATED, UNPARSEABLE, TIMED_OUT)],
        np.int8(-1),
    )


def _curve(seen: Sequence[tuple[float, Outcome]], cfg: TriageConfig) -> Curve:
    return calibrate(
        [u for u, _ in seen],
        [probe.pass_rate for _, probe in seen],
        [probe.majority_right for _, probe in seen],
        mastered=cfg.mastered,
        trusted=cfg.trusted,
        window=cfg.window,
        draws=cfg.draws,
        seed=cfg.seed,
    )


def _reasons(u: Floats, known: NDArray[np.bool_], owned: NDArray[np.bool_], curve: Curve) -> Codes:
    """[P] codes of the reasons before the budget is looked at."""
    never = np.zeros(len(u), dtype=bool)
    mistrusted = never if curve.u_high is None else u >= curve.u_high
    # Where both thresholds meet, mistrust wins.
    mastered = never if curve.u_low is None else known & (u <= curve.u_low) & ~mistrusted
    return np.select(
        [mastered & owned, mastered, owned, ~known, mistrusted],
        [
            np.int8(_CODE[name])
            for name in (MASTERED_LABELLED, MASTERED, LABELLED, UNKNOWN, NOT_TRUSTED)
        ],
        np.int8(_CODE[TRUSTED]),
    )


def _market(cost: Floats, sources: Any, owned: NDArray[np.bool_], spent: float) -> Market:
    if sources is None:
        return Market(cost, np.zeros(len(cost), dtype=np.int32), ["pool"], owned, spent)
    coded = _array(sources).dictionary_encode()
    names = list(coded.dictionary.to_pylist())
    return Market(cost, np.asarray(coded.indices, dtype=np.int32), names, owned, spent)


def _rows(ids: pa.Array, reason: Codes, u: Floats, cost: Floats, cfg: TriageConfig) -> pa.Table:
    routes = [cfg.overflow if route == "overflow" else route for route in ROUTE_OF.values()]

    def text(names: Sequence[str]) -> pa.Array:
        return pa.DictionaryArray.from_arrays(pa.array(reason), pa.array(names)).cast(pa.string())

    return pa.Table.from_arrays(
        [
            ids,
            text(routes),
            pa.array(u),
            # u holds the ranks of all prompts, evenly spread.
            pa.array(np.rint((1 - u) * (len(u) - 1)).astype(np.int64) + 1),
            text(_REASONS),
            pa.array(cost),
        ],
        schema=PLAN_SCHEMA,
    )


def _array(values: Any) -> pa.Array:
    array = values if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(values)
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
