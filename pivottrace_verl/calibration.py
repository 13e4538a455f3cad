"""Calibration: what the probes say about the ranking.

Contract: u is a rank in [0, 1], 1 = most uncertain; a probe's outcome is its pass rate p against
the bought label and whether the majority answer is right. The curve is a sliding mean over the
probes in order of u, made monotone (the ranking is only used if p falls with u, so a local rise
is noise), and gives the two thresholds.

Axes: N probes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression

from pivottrace_verl.answers import AnswerKind, get_answers
from pivottrace_verl.errors import PivotTraceError

Floats = NDArray[np.float64]
PREFIX = "uncertainty/"
"""Columns of the scores that hold an estimator begin so."""
_TOLERANCE = 1e-9
"""Means of tenths miss their exact value by a rounding error."""


def rank01(values: ArrayLike, ids: Sequence[str]) -> Floats:
    """Ranks spread evenly over [0, 1], smallest value 0; ties by id, so the order of the rows
    cannot matter. NaN (unknown) ranks above every number. A single value has rank 1."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) != len(ids):
        raise ValueError(f"{len(array)} values for {len(ids)} ids")
    # NaN sorts last in lexsort, as it does in sort.
    order = np.lexsort((np.asarray(ids, dtype=np.str_), array))
    ranks = np.ones(len(array))
    if len(array) > 1:
        ranks[order] = np.arange(len(array)) / (len(array) - 1)
    return ranks


def default_probes(n_prompts: int) -> int:
    """max(64, 2% of the pool), at most the whole pool."""
    return min(n_prompts, max(64, math.ceil(0.02 * n_prompts)))


def choose_probes(u: ArrayLike, ids: Sequence[str], n: int, seed: int) -> list[str]:
    """`n` ids, one drawn from each of n equal stretches of the ranking, ascending in u.

    Depends on (u, id) pairs and seed, not on their order. PivotTraceError unless 1 <= n <= P.
    """
    if not 1 <= n <= len(ids):
        raise PivotTraceError(
            f"{n} probes were asked for, but the pool has {len(ids)} prompts and at least 1 is "
            "needed."
        )
    order = np.lexsort((np.asarray(ids, dtype=np.str_), np.asarray(u, dtype=np.float64)))
    rng = np.random.Generator(np.random.PCG64([seed % 2**63, len(ids), n]))
    return [ids[rng.choice(stretch)] for stretch in np.array_split(order, n)]


@dataclass(frozen=True)
class Outcome:
    """How the policy did on one labelled prompt."""

    pt_id: str
    pass_rate: float
    """Share of all rollouts, unparseable ones included, whose answer equals the label."""
    majority_right: bool
    """Whether the majority answer equals the label; False where there is no majority."""


def rows_of(scores: Any, columns: Sequence[str] | None = None) -> list[Mapping[str, Any]]:
    """The scores as dicts, from a table (without the bulky `rollouts`) or from dicts already."""
    if hasattr(scores, "to_pylist"):
        names = columns or [name for name in scores.schema.names if name != "rollouts"]
        return list(scores.select(list(names)).to_pylist())
    return list(scores)


def outcomes(scores: Any, labels: Mapping[str, str], kind: AnswerKind | str) -> list[Outcome]:
    """Outcome of every prompt in `labels`, in the order of the scores.

    Raises PivotTraceError for labels of prompts that are not scored.
    """
    kind = get_answers(kind) if isinstance(kind, str) else kind
    rows = rows_of(scores, ["pt_id", "n_rollouts", "answers", "majority"])
    unknown = sorted(set(labels) - {row["pt_id"] for row in rows})
    if unknown:
        raise PivotTraceError(
            f"{len(unknown)} labelled prompts are not among the scores (first: {unknown[0]})."
        )
    out = []
    for row in rows:
        if row["pt_id"] not in labels:
            continue
        label = labels[row["pt_id"]]
        right = sum(c["count"] for c in row["answers"] if kind.equal(c["answer"], label))
        majority = row["majority"]
        out.append(
            Outcome(
                pt_id=row["pt_id"],
                pass_rate=right / row["n_rollouts"],
                majority_right=majority is not None and kind.equal(majority, label),
            )
        )
    return out


@dataclass(frozen=True)
class Curve:
    """p(u) and m(u) along the ranking, and where they cross the thresholds."""

    u: list[float]
    """[N] rank of each probe, ascending."""
    p: list[float]
    """[N] mean pass rate in the window around the probe."""
    m: list[float]
    """[N] share of right majorities in the window around the probe."""
    p_monotone: list[float]
    m_monotone: list[float]
    u_low: float | None
    """Up to here p >= mastered; None: nowhere. Never above u_high."""
    u_high: float | None
    """From here m < trusted; None: nowhere."""
    probes: int
    window: int
    """Probes in a whole window."""


def calibrate(
    u: ArrayLike,
    p: ArrayLike,
    m: ArrayLike,
    *,
    mastered: float = 0.9,
    trusted: float = 0.7,
    window: float = 0.25,
) -> Curve:
    """[N] ranks, pass rates and majority outcomes -> the curve.

    A window reaches `window`/2 of the probes to both sides of each probe; at the ends it is cut
    off, not moved inwards, where it could not see a steep end. Between probes the curve is linear.
    """
    order = np.argsort(np.asarray(u, dtype=np.float64), kind="stable")
    if len(order) == 0:
        raise PivotTraceError("No probe is labelled, so no threshold can be calibrated.")
    at = np.asarray(u, dtype=np.float64)[order]
    reach = round(window * len(order)) // 2

    def sliding(values: ArrayLike) -> Floats:
        array = np.asarray(values, dtype=np.float64)[order]
        return np.array([array[max(0, i - reach) : i + reach + 1].mean() for i in range(len(at))])

    pass_rate, right = sliding(p), sliding(m)
    p_fall = np.asarray(isotonic_regression(pass_rate, increasing=False).x)
    m_fall = np.asarray(isotonic_regression(right, increasing=False).x)
    u_high = _crossing(at, m_fall, trusted)
    u_low = _crossing(at, p_fall, mastered)
    low: float | None = None
    if p_fall[0] >= mastered - _TOLERANCE:
        # A curve that never falls below the level is mastered to the end.
        low = min(1.0 if u_low is None else u_low, 1.0 if u_high is None else u_high)
    return Curve(
        u=at.tolist(),
        p=pass_rate.tolist(),
        m=right.tolist(),
        p_monotone=p_fall.tolist(),
        m_monotone=m_fall.tolist(),
        u_low=low,
        u_high=u_high,
        probes=len(order),
        window=min(2 * reach + 1, len(order)),
    )


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
