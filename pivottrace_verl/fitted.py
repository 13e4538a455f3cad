"""Estimators fitted on the probes: ridge regression of the pass rate on columns of the scores.

Contract: `calibrated` sees the attention alone (`features/*` and the pivot estimators),
`calibrated_all` the cheap scores too. Both learn from the probes' pass rates alone, and what is
said about them on the probes rests on out-of-fold values, never on the fit itself. Higher = more
uncertain; NaN where none of the columns is known.

Why the pass rate and not "the majority answer is wrong": it tells more of each probe. On synthetic
pools (64 probes, 12 columns) the L2-regularised logistic regression on wrong majorities loses 0.01
to 0.02 AUROC for wrong majorities and 0.03 Spearman to it. Ridge regression also has a closed
form, so the permutation test can fit it anew on every permutation of the outcomes.

Axes: P prompts, N probes, D columns, B sets of outcomes (1, or the permutations).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pivottrace_verl.calibration import PREFIX, Floats
from pivottrace_verl.score_columns import FEATURES, Probed, numbers

CHEAP = ("entropy", "entropy_forks", "self_certainty", "nll", "consistency", "length")
"""Estimators that cost nothing once the rollouts are there."""
FITTED = ("calibrated", "calibrated_all")
FEWEST_OF_A_CLASS = 8
"""Right and wrong majorities among the probes, each, below which nothing is fitted."""
STRENGTHS = np.logspace(-3, 2, 11)
"""Penalties tried, as multiples of the probes fitted on."""
FOLDS = 5
REPEATS = 5
"""Times the folds are drawn; once suffices beyond MANY probes."""
MANY = 1000


def columns_for(name: str, available: Sequence[str]) -> list[str]:
    """The columns of the scores that a fitted estimator sees; none without features."""
    features = [c for c in available if c.startswith(FEATURES)]
    if not features:
        return []
    # A pivot density may be kept as a feature, too: once is enough.
    pivots = [
        c
        for c in available
        if c.startswith(f"{PREFIX}pivot") and FEATURES + c.removeprefix(PREFIX) not in available
    ]
    cheap = [PREFIX + n for n in CHEAP if PREFIX + n in available]
    return features + pivots + (cheap if name == "calibrated_all" else [])


def design(columns: dict[str, Floats], names: Sequence[str]) -> Floats:
    """[N, D] the columns side by side; what is not finite is unknown, NaN."""
    x = np.stack([columns[name] for name in names], axis=1)
    return np.where(np.isfinite(x), x, np.nan)


def why_not(name: str, probed: Probed) -> str | None:
    """A sentence why the estimator cannot be fitted on these probes; None if it can."""
    names = columns_for(name, list(probed.columns))
    if not names:
        return f"The estimator '{name}' is not offered: the scores have no {FEATURES} columns."
    seen = ~np.isnan(design(probed.columns, names)).all(axis=1)
    wrong = int(probed.wrong[seen].sum())
    right = int(seen.sum()) - wrong
    if min(wrong, right) < FEWEST_OF_A_CLASS:
        return (
            f"The estimator '{name}' is not offered: of the probes that were traced, {right} have "
            f"a right and {wrong} a wrong majority, but at least {FEWEST_OF_A_CLASS} of each are "
            "needed."
        )
    return None


@dataclass(frozen=True)
class Fit:
    """Uncertainty as a linear function of D columns, for B sets of outcomes."""

    mean: Floats
    """[D] of the probes fitted on."""
    scale: Floats
    """[D] their standard deviation; 1 where the column is constant."""
    weights: Floats
    """[D, B] per standard deviation; positive = more uncertain."""
    strength: Floats
    """[B] the penalty chosen, as a multiple of the probes."""

    def values(self, x: Floats) -> Floats:
        """[N, D] -> [N, B]. A missing column counts as its mean. No intercept: a ranking needs
        none, and its chance correlation with the fold left out would bias out-of-fold ranks."""
        return np.asarray(_standard(x, self.mean, self.scale) @ self.weights)


def _standard(x: Floats, mean: Floats, scale: Floats) -> Floats:
    return np.nan_to_num((x - mean) / scale)


def fit(x: Floats, rate: Floats) -> Fit:
    """[N, D], [N, B] pass rates -> ridge regression on standardised columns.

    The penalty has the least generalised cross-validation error (Golub, Heath and Wahba 1979:
    leave-one-out, in closed form and free of the choice of axes), for each of the B outcomes. Rows
    without any known column take no part.
    """
    seen = ~np.isnan(x).all(axis=1)
    x, y = x[seen], rate[seen]
    n = len(x)
    known = ~np.isnan(x)
    count = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, x, 0.0).sum(axis=0) / count
    spread = np.sqrt((np.where(known, x - mean, 0.0) ** 2).sum(axis=0) / count)
    scale = np.where(spread > 1e-9 * np.abs(mean) + 1e-300, spread, 1.0)
    y = y - y.mean(axis=0)
    u, s, vt = np.linalg.svd(_standard(x, mean, scale), full_matrices=False)
    along = u.T @ y
    gain = s**2 / (s**2 + STRENGTHS[:, None] * n)
    # [strengths, B] sum of squared residuals, and [strengths] residual degrees of freedom.
    rest = np.einsum("nb,nb->b", y, y) - (1 - (1 - gain) ** 2) @ along**2
    free = n - 1 - gain.sum(axis=1)
    best = np.argmin(rest / np.maximum(free, 1e-9)[:, None] ** 2, axis=0)
    strength = STRENGTHS[best]
    shrunk = (s[:, None] / (s[:, None] ** 2 + strength * n)) * along
    return Fit(mean, scale, -(vt.T @ shrunk), strength)


def out_of_fold(x: Floats, rate: Floats, seed: int = 0) -> Floats:
    """[N, D], [N, B] -> [N, B] uncertainty of each probe by fits that have not seen it: the mean
    over repeated 5-fold cross-validations. The folds do not look at the outcomes, so that a
    permutation of these is as good as another."""
    out = np.zeros(rate.shape)
    for rest, held in folds(len(x), seed):
        out[held] += fit(x[rest], rate[rest]).values(x[held])
    out[np.isnan(x).all(axis=1)] = np.nan
    return out / repeats(len(x))


def repeats(n: int) -> int:
    """Times that n probes are dealt into folds."""
    return REPEATS if n <= MANY else 1


def folds(n: int, seed: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(rows to fit on, rows held out) of the repeated 5-fold cross-validations."""
    rng = np.random.Generator(np.random.PCG64([seed, n]))
    for _ in range(repeats(n)):
        for held in np.array_split(rng.permutation(n), FOLDS):
            yield np.setdiff1d(np.arange(n), held), held


def pool_values(table: pa.Table, probed: Probed, name: str) -> Floats:
    """[P] uncertainty of the whole pool by the fit on all probes; the probes' own values are
    out of fold, so that a curve calibrated on them is not flattered."""
    names = columns_for(name, list(probed.columns))
    x, rate = design(probed.columns, names), probed.pass_rate[:, None]
    fitted = fit(x, rate)
    values, seen = np.zeros(table.num_rows), np.zeros(table.num_rows, dtype=bool)
    # Column by column: the pool side by side would be D times as large.
    for i, column in enumerate(names):
        raw = numbers(table, column)
        finite = np.isfinite(raw)
        part = fitted.weights[i, 0] * (raw - fitted.mean[i]) / fitted.scale[i]
        values += np.where(finite, part, 0.0)
        seen |= finite
    values[~seen] = np.nan
    values[probed.rows] = out_of_fold(x, rate)[:, 0]
    return values


def explain(probed: Probed, name: str) -> dict[str, Any]:
    """JSON-able: how the fit on all probes weighs its columns."""
    names = columns_for(name, list(probed.columns))
    fitted = fit(design(probed.columns, names), probed.pass_rate[:, None])
    return {
        "target": "pass rate (ridge regression; positive weight = more uncertain)",
        "penalty_per_probe": float(fitted.strength[0]),
        "columns": [
            {
                "column": column,
                "weight": float(fitted.weights[i, 0]),
                "mean": float(fitted.mean[i]),
                "scale": float(fitted.scale[i]),
            }
            for i, column in enumerate(names)
        ],
    }
