"""Calibration: what the probes say about the ranking.

Contract: u is a rank in [0, 1], 1 = most uncertain; a probe's outcome is its pass rate p against
the bought label and whether the majority answer is right. The curve is a sliding mean over the
probes in order of u, made monotone (the ranking is only used if p falls with u, so a local rise
is noise), and gives the two thresholds. Intervals are percentiles of a bootstrap over the probes.

Axes: P prompts, N probes, B bootstrap draws.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression

from pivottrace_verl.answers import AnswerKind, Grade, grade_many
from pivottrace_verl.errors import PivotTraceError

Floats = NDArray[np.float64]
PREFIX = "uncertainty/"
"""Columns of the scores that hold an estimator begin so."""
_TOLERANCE = 1e-9
"""Means of tenths miss their exact value by a rounding error."""
LEVEL = 0.95
"""Of the bootstrap intervals."""
Ids: TypeAlias = Sequence[str] | pa.Array | pa.ChunkedArray
Interval = tuple[float | None, float | None]
"""Ends of a threshold's interval; None: in that share of the draws the threshold is nowhere."""


def _ascending(values: ArrayLike, ids: Ids) -> NDArray[np.intp]:
    """[P] the order of (value, id), NaN last."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) != len(ids):
        raise ValueError(f"{len(array)} values for {len(ids)} ids")
    if isinstance(ids, pa.ChunkedArray):
        ids = ids.combine_chunks()
    batch = pa.record_batch({"value": pa.array(array), "id": pa.array(ids, pa.string())})
    keys = [("value", "ascending"), ("id", "ascending")]
    return np.asarray(pc.sort_indices(batch, sort_keys=keys), dtype=np.intp)


def rank01(values: ArrayLike, ids: Ids) -> Floats:
    """Ranks spread evenly over [0, 1], smallest value 0; ties by id, so the order of the rows
    cannot matter. NaN (unknown) ranks above every number. A single value has rank 1."""
    order = _ascending(values, ids)
    ranks = np.ones(len(order))
    if len(order) > 1:
        ranks[order] = np.arange(len(order)) / (len(order) - 1)
    return ranks


def default_probes(n_prompts: int) -> int:
    """max(64, 2% of the pool), at most the whole pool."""
    return min(n_prompts, max(64, math.ceil(0.02 * n_prompts)))


def choose_probes(u: ArrayLike, ids: Ids, n: int, seed: int) -> list[str]:
    """`n` ids, one drawn from each of n equal stretches of the ranking, ascending in u.

    Depends on (u, id) pairs and seed, not on their order. PivotTraceError unless 1 <= n <= P.
    """
    if not 1 <= n <= len(ids):
        raise PivotTraceError(
            f"{n} probes were asked for, but the pool has {len(ids)} prompts and at least 1 is "
            "needed."
        )
    order = _ascending(u, ids)
    rng = np.random.Generator(np.random.PCG64([seed % 2**63, len(ids), n]))
    drawn = [ids[int(rng.choice(stretch))] for stretch in np.array_split(order, n)]
    return [pt_id if isinstance(pt_id, str) else pt_id.as_py() for pt_id in drawn]


@dataclass(frozen=True)
class Outcome:
    """How the policy did on one labelled prompt."""

    pt_id: str
    pass_rate: float
    """Share of all rollouts, unparseable ones included, whose answer equals the label."""
    majority_right: bool
    """Whether the majority answer equals the label; False where there is no majority."""


def table_of(scores: Any) -> pa.Table:
    """The scores as a table, from a table or from dicts."""
    return scores if isinstance(scores, pa.Table) else pa.Table.from_pylist(list(scores))


def outcomes(scores: Any, labels: Mapping[str, str], kind: AnswerKind | str) -> list[Outcome]:
    """Outcome of every prompt in `labels`, in the order of the scores. An answer whose comparison
    with the label timed out is not known to be right, and counts as wrong.

    Raises PivotTraceError for labels of prompts that are not scored.
    """
    table = table_of(scores).select(["pt_id", "n_rollouts", "answers", "majority"])
    bought = pa.array(list(labels), pa.string())
    rows = table.filter(pc.is_in(table["pt_id"], value_set=bought)).to_pylist()
    unknown = sorted(set(labels) - {row["pt_id"] for row in rows})
    if unknown:
        raise PivotTraceError(
            f"{len(unknown)} labelled prompts are not among the scores (first: {unknown[0]})."
        )
    pairs: set[tuple[str, str]] = set()
    for row in rows:
        label = labels[row["pt_id"]]
        given = [cluster["answer"] for cluster in row["answers"]]
        given += [] if row["majority"] is None else [row["majority"]]
        pairs |= {(answer, label) for answer in given}
    # All at once: a kind with workers compares them side by side.
    asked = sorted(pairs)
    grades = dict(zip(asked, grade_many(kind, asked), strict=True))
    out = []
    for row in rows:
        label = labels[row["pt_id"]]
        right = [c["count"] for c in row["answers"] if grades[c["answer"], label] is Grade.RIGHT]
        out.append(
            Outcome(
                pt_id=row["pt_id"],
                pass_rate=sum(right) / row["n_rollouts"],
                majority_right=grades.get((row["majority"], label)) is Grade.RIGHT,
            )
        )
    return out


@dataclass(frozen=True)
class Curve:
    """p(u) and m(u) along the ranking, and where they cross the thresholds.

    Every list is [N], one value a probe; `_low` and `_high` are the ends of its interval.
    """

    u: list[float]
    """Rank of each probe, ascending."""
    p: list[float]
    """Mean pass rate in the window around the probe."""
    p_low: list[float]
    p_high: list[float]
    m: list[float]
    """Share of right majorities in the window around the probe."""
    m_low: list[float]
    m_high: list[float]
    p_monotone: list[float]
    """The sliding means made monotone by isotonic regression; these set the thresholds."""
    p_monotone_low: list[float]
    p_monotone_high: list[float]
    m_monotone: list[float]
    m_monotone_low: list[float]
    m_monotone_high: list[float]
    u_low: float | None
    """Up to here p >= mastered; None: nowhere. Never above u_high."""
    u_low_interval: Interval
    u_high: float | None
    """From here m < trusted; None: nowhere."""
    u_high_interval: Interval
    probes: int
    window: int
    """Probes in a whole window."""
    draws: int
    """B, of the bootstrap behind the intervals."""
    level: float = LEVEL


@dataclass(frozen=True)
class _Fit:
    """The curve of one sample of probes: of the probes themselves, or of one bootstrap draw."""

    p: Floats
    m: Floats
    p_monotone: Floats
    m_monotone: Floats
    u_low: float | None
    u_high: float | None


def calibrate(
    u: ArrayLike,
    p: ArrayLike,
    m: ArrayLike,
    *,
    mastered: float = 0.9,
    trusted: float = 0.7,
    window: float = 0.25,
    draws: int = 400,
    seed: int = 0,
) -> Curve:
    """[N] ranks, pass rates and majority outcomes -> the curve.

    A window reaches `window`/2 of the probes to both sides of each probe; at the ends it is cut
    off, not moved inwards, where it could not see a steep end. Between probes the curve is linear.
    Each of the `draws` resamples the probes with replacement; at a few probes, and near the ends,
    percentile intervals are somewhat too narrow.
    """
    at = np.asarray(u, dtype=np.float64)
    order = np.argsort(at, kind="stable")
    if len(order) == 0:
        raise PivotTraceError("No probe is labelled, so no threshold can be calibrated.")
    at = at[order]
    rate, right = (np.asarray(values, dtype=np.float64)[order] for values in (p, m))
    reach = round(window * len(order)) // 2
    fit = _fit(at, rate, right, reach, mastered, trusted)

    curves = {name: np.empty((draws, len(at)), np.float32) for name in _CURVES}
    lows, highs = np.empty(draws), np.empty(draws)
    rng = np.random.default_rng(seed)
    for draw in range(draws):
        chosen = np.sort(rng.integers(len(at), size=len(at)))
        other = _fit(at[chosen], rate[chosen], right[chosen], reach, mastered, trusted)
        for name, values in curves.items():
            values[draw] = np.interp(at, at[chosen], getattr(other, name))
        lows[draw] = -math.inf if other.u_low is None else other.u_low
        highs[draw] = math.inf if other.u_high is None else other.u_high
    lists: dict[str, Any] = {}
    for name, values in curves.items():
        lists[name] = getattr(fit, name).tolist()
        lists[f"{name}_low"], lists[f"{name}_high"] = _band(values)
    return Curve(
        u=at.tolist(),
        **lists,
        u_low=fit.u_low,
        u_low_interval=_interval(lows),
        u_high=fit.u_high,
        u_high_interval=_interval(highs),
        probes=len(at),
        window=min(2 * reach + 1, len(at)),
        draws=draws,
    )


_CURVES = ("p", "m", "p_monotone", "m_monotone")
_ENDS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)


def _fit(
    at: Floats, rate: Floats, right: Floats, reach: int, mastered: float, trusted: float
) -> _Fit:
    """The curve through probes that are in order of u."""
    p, m = _sliding(rate, reach), _sliding(right, reach)
    p_fall = np.asarray(isotonic_regression(p, increasing=False).x)
    m_fall = np.asarray(isotonic_regression(m, increasing=False).x)
    u_high = _crossing(at, m_fall, trusted)
    u_low: float | None = None
    if p_fall[0] >= mastered - _TOLERANCE:
        crossing = _crossing(at, p_fall, mastered)
        # A curve that never falls below the level is mastered to the end.
        u_low = min(1.0 if value is None else value for value in (crossing, u_high))
    return _Fit(p, m, p_fall, m_fall, u_low, u_high)


def _sliding(values: Floats, reach: int) -> Floats:
    """[N] mean of each value and its `reach` neighbours to both sides."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    first, last = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    return np.asarray((sums[last] - sums[first]) / (last - first))


def _band(draws: NDArray[np.float32]) -> tuple[list[float], list[float]]:
    """[B, N] -> the interval's ends at each probe; four digits are more than B draws can tell."""
    low, high = np.quantile(draws, _ENDS, axis=0).astype(np.float64).round(4)
    return low.tolist(), high.tolist()


def _interval(thresholds: Floats) -> Interval:
    """[B] -> ends that were drawn themselves: between a number and nowhere there is no mean."""
    low = float(np.quantile(thresholds, _ENDS[0], method="lower"))
    high = float(np.quantile(thresholds, _ENDS[1], method="higher"))
    return (low if math.isfinite(low) else None, high if math.isfinite(high) else None)


def _crossing(u: Floats, falling: Floats, level: float) -> float | None:
    """Where a falling curve goes below `level`: 0 if it starts below, None if it never does."""
    below = np.flatnonzero(falling < level - _TOLERANCE)
    if below.size == 0:
        return None
    i = int(below[0])
    if i == 0:
        return 0.0
    share = (falling[i - 1] - level) / (falling[i - 1] - falling[i])
    return float(u[i - 1] + max(0.0, share) * (u[i] - u[i - 1]))
