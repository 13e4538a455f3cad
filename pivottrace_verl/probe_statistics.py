"""How well a score tells where the policy fails: AUROC, Spearman, risk and coverage.

Contract: every statistic takes weights [B, N], how often each probe counts in each of B draws, so
one formula serves the probes themselves (all ones) and their bootstrap; ties count half, and NaN
marks a draw in which the statistic does not exist. Scores hold no NaN here.

    low, high = interval(aurocs(w, score, wrong) for w in bootstrap(n, 1000, seed))

Axes: N probes, B draws, K groups of tied values.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import spearmanr

from pivottrace_verl.calibration import Floats

Bools = NDArray[np.bool_]
LEVEL = 0.95
"""Of every interval."""
_CELLS = 2_000_000
"""Numbers in one array of weights: what keeps the bootstrap of 20,000 probes in memory."""


def bootstrap(n: int, draws: int, seed: int) -> Iterator[Floats]:
    """`draws` resamples of n probes with replacement, as weights [B, N], in handy portions."""
    rng = np.random.Generator(np.random.PCG64([seed % 2**63, n]))
    step = max(1, _CELLS // max(n, 1))
    for start in range(0, draws, step):
        b = min(step, draws - start)
        drawn = rng.integers(n, size=(b, n)) + n * np.arange(b)[:, None]
        yield np.bincount(drawn.ravel(), minlength=b * n).reshape(b, n).astype(np.float64)


def interval(draws: ArrayLike, level: float = LEVEL) -> tuple[float, float]:
    """Percentile interval of a statistic's draws, those that do not exist left out."""
    array = np.asarray(draws, dtype=np.float64)
    kept = array[~np.isnan(array)]
    if not kept.size:
        return math.nan, math.nan
    low, high = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _tied(score: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(order, first place of each run of equal values in it, sizes of the runs)."""
    order = np.argsort(score, kind="stable")
    ordered = score[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    return order, starts, np.diff(np.r_[starts, len(order)])


def midranks(weights: Floats, score: Floats) -> Floats:
    """[B, N] rank of every probe within its draw, from 1; ties share their mean rank."""
    order, starts, sizes = _tied(score)
    runs = np.add.reduceat(weights[:, order], starts, axis=1)
    middle = np.cumsum(runs, axis=1) - runs + (runs + 1) / 2
    ranks = np.empty_like(weights)
    ranks[:, order] = np.repeat(middle, sizes, axis=1)
    return ranks


def _concordance(weights: Floats, score: Floats, positive: Bools) -> tuple[Floats, Floats]:
    """[B] concordant pairs of a positive and a negative, [B] pairs."""
    chosen = weights[:, positive]
    n = chosen.sum(axis=1)
    pairs = n * (weights.sum(axis=1) - n)
    sums = (chosen * midranks(weights, score)[:, positive]).sum(axis=1)
    return sums - n * (n + 1) / 2, pairs


def ratio(above: Floats, below: Floats) -> Floats:
    """above / below; NaN where below is 0."""
    return np.asarray(np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0))


def aurocs(weights: Floats, score: Floats, positive: Bools) -> Floats:
    """[B] chance that a positive has the higher score; NaN where one class is empty."""
    if not len(score):
        return np.full(len(weights), np.nan)
    return ratio(*_concordance(weights, score, positive))


def aurocs_within(weights: Floats, score: Floats, positive: Bools, length: Floats) -> Floats:
    """[B] AUROC over the pairs of similar length: both in one third of the lengths."""
    thirds = np.array_split(np.argsort(length, kind="stable"), 3)
    concordant, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for third in thirds:
        if third.size:
            c, p = _concordance(weights[:, third], score[third], positive[third])
            concordant, pairs = concordant + c, pairs + p
    return ratio(concordant, pairs)


def spearmans(weights: Floats, score: Floats, rate: Floats) -> Floats:
    """[B] rank correlation; NaN where one side is constant."""
    if not len(score):
        return np.full(len(weights), np.nan)
    n = weights.sum(axis=1, keepdims=True)
    x, y = midranks(weights, score), midranks(weights, rate)
    x -= (n + 1) / 2  # The mean of midranks, whatever the ties.
    y -= (n + 1) / 2
    spread = (weights * x * x).sum(axis=1) * (weights * y * y).sum(axis=1)
    together = (weights * x * y).sum(axis=1)
    return ratio(together, np.where(spread > 1e-9, np.sqrt(np.abs(spread)), 0.0))


def aurcs(weights: Floats, score: Floats, wrong: Bools) -> Floats:
    """[B] area under the risk-coverage curve (Geifman and El-Yaniv 2017), lower is better.

    Risk at coverage k/N = share of wrong majorities among the k least uncertain probes; the area
    is its mean over k = 1..N. Tied probes are taken in random order, in expectation, so a
    constant score, like a random order, gives the share of wrong majorities.
    """
    if not len(score):
        return np.full(len(weights), np.nan)
    order, starts, _ = _tied(score)
    taken = weights[:, order]
    runs = np.add.reduceat(taken, starts, axis=1)
    bad = np.add.reduceat(taken * wrong[order], starts, axis=1)
    after = np.cumsum(runs, axis=1)
    before = after - runs
    share = np.divide(bad, runs, out=np.zeros_like(bad), where=runs > 0)
    most = int(after[:, -1].max())
    harmonic = np.r_[0.0, np.cumsum(1.0 / np.arange(1, most + 1))]
    # Sum over k in the run of (wrong before + share * (k - before)) / k.
    stretch = harmonic[after.astype(np.int64)] - harmonic[before.astype(np.int64)]
    wrong_before = np.cumsum(bad, axis=1) - bad
    area = (bad + (wrong_before - before * share) * stretch).sum(axis=1)
    return ratio(area, after[:, -1])


def auroc(score: ArrayLike, positive: ArrayLike) -> float:
    """Chance that a positive has the higher score, ties half; NaN if one class is empty."""
    x, y = np.asarray(score, float), np.asarray(positive, bool)
    return float(aurocs(np.ones((1, len(x))), x, y)[0])


def spearman(a: ArrayLike, b: ArrayLike) -> tuple[float, float]:
    """(rho, p value); (NaN, NaN) if one side is constant or there are fewer than 3."""
    x, y = np.asarray(a, float), np.asarray(b, float)
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan, math.nan
    found = spearmanr(x, y)
    return float(found.statistic), float(found.pvalue)


def known(score: Floats) -> Bools:
    """[N] where a score has a value."""
    return ~np.isnan(score)


def one(values: Floats) -> float | None:
    """The statistic of a single draw; None if it does not exist."""
    return None if math.isnan(values[0]) else float(values[0])
