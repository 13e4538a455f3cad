"""What chance alone would show: permutation tests over all estimators at once.

Contract: the outcomes of the probes are dealt out anew among them, many times, and every
statistic is taken again (fitted estimators are fitted again); a p value is the share of deals that
are at least as extreme, the real one included, so it is exact whatever the ties. The adjusted one
compares with the most extreme estimator of every deal (Westfall and Young 1993, single-step max):
the chance that *any* of the estimators tried looks that good if none says anything.

Axes: N probes, B deals (the first is the real one), E estimators.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from pivottrace_verl.calibration import Floats
from pivottrace_verl.fitted import out_of_fold
from pivottrace_verl.probe_statistics import Bools, known, ratio

DEALS = 2000
_CELLS = 4_000_000
"""Outcomes dealt in all: 200 deals of 20,000 probes."""
FEWEST_DEALS = 200


@dataclass(frozen=True)
class Deals:
    """Statistics of every estimator in every deal; NaN where they do not exist."""

    names: list[str]
    spearman: Floats
    """[B, E] of the score with the pass rate."""
    auroc: Floats
    """[B, E] of the score for a wrong majority."""
    out_of_fold: dict[str, Floats]
    """[N] each: the fitted estimators' values of the probes."""


def deal(
    scores: Mapping[str, Floats],
    designs: Mapping[str, Floats],
    rate: Floats,
    wrong: Bools,
    seed: int = 0,
) -> Deals:
    """Scores [N] and designs [N, D] (of fitted estimators), outcomes [N] -> their deals."""
    n = len(rate)
    count = min(DEALS, max(FEWEST_DEALS, _CELLS // max(n, 1)))
    rng = np.random.Generator(np.random.PCG64([seed % 2**63, n]))
    order = np.tile(np.arange(n), (count, 1))
    order[1:] = rng.permuted(order[1:], axis=1)
    rates, wrongs = rate[order].T, wrong[order].T
    rate_ranks = rankdata(rate)[order].T
    rhos, areas = [], []
    held = {name: out_of_fold(x, rates) for name, x in designs.items()}
    for values in [*(score[:, None] for score in scores.values()), *held.values()]:
        seen = known(values[:, 0])
        ranks = rankdata(values[seen], axis=0)
        against = rate_ranks if seen.all() else rankdata(rates[seen], axis=0)
        rhos.append(np.broadcast_to(_correlation(ranks, against), count))
        areas.append(np.broadcast_to(_area(ranks, wrongs[seen]), count))
    stacked = [np.stack(part, axis=1) if part else np.empty((count, 0)) for part in (rhos, areas)]
    first = {name: values[:, 0].copy() for name, values in held.items()}
    return Deals([*scores, *designs], stacked[0], stacked[1], first)


def _correlation(x: Floats, y: Floats) -> Floats:
    """[B] of the columns of ranks [N, B]; those of x may be one for all, [N, 1]."""
    if len(x) < 3:
        return np.full(1, np.nan)
    a, b = x - x.mean(axis=0), y - y.mean(axis=0)
    spread = np.sqrt(_dot(a, a) * _dot(b, b))
    return ratio(_dot(a, b), np.where(spread > 1e-9, spread, 0.0))


def _area(ranks: Floats, wrong: Bools) -> Floats:
    """[B] AUROC from the ranks, [N, B] or [N, 1], and the outcomes [N, B]."""
    n = wrong.sum(axis=0).astype(np.float64)
    return ratio(_dot(ranks, wrong.astype(np.float64)) - n * (n + 1) / 2, n * (len(wrong) - n))


def _dot(x: Floats, y: Floats) -> Floats:
    """[B] of the columns, without an array for their products."""
    return np.asarray(np.einsum("nb,nb->b", x, y))


def p_values(statistic: Floats, sides: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """[B, E] deals, [E] sides -> [E] p values, [E] adjusted for the number of estimators.

    A side is 1 if only high statistics count, -1 if only low ones, 0 if both. Each estimator is
    measured in its own spread over the deals, so that none of them dominates the maximum. NaN
    where the real statistic does not exist; such an estimator is not among those tried.
    """
    p, adjusted = np.full(len(sides), np.nan), np.full(len(sides), np.nan)
    tried = np.flatnonzero(~np.isnan(statistic[0]))
    if not len(tried):
        return p, adjusted
    drawn, side = statistic[:, tried], sides[tried]
    spread = np.nanstd(drawn, axis=0)
    z = np.nan_to_num((drawn - np.nanmean(drawn, axis=0)) / np.where(spread > 0, spread, 1.0))
    extreme = np.where(side == 0, np.abs(z), side * z)
    most = extreme.max(axis=1)
    # Equal deals must not fall apart by rounding.
    real = extreme[0] - 1e-9
    p[tried] = (extreme >= real).mean(axis=0)
    adjusted[tried] = (most[:, None] >= real).mean(axis=0)
    return p, adjusted
