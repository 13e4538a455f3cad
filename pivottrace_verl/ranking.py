"""Ranking: which estimator orders the pool, and in which direction, as the probes see it.

Contract: the probes decide. An estimator they do not confirm is refused (`Uninformative`), naming
the one that would serve. Values are raw, higher = more uncertain after the direction is applied,
NaN = unknown.

    ranking = rank_pool(scores, probes, TriageConfig())
    ranking.values, ranking.estimator, ranking.direction, ranking.spearman

Axes: P prompts, N probes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata, spearmanr

from pivottrace_verl.calibration import PREFIX, Floats, Outcome, rank01, rows_of
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.plan import AUTO, TriageConfig


class Uninformative(PivotTraceError):
    """The ranking says nothing about where the policy fails."""

    def __init__(self, message: str, best: str | None, table: list[dict[str, Any]]) -> None:
        super().__init__(message)
        self.best = best
        """The estimator that would serve; None if none does."""
        self.table = table
        """`estimator_table` of the probes."""


@dataclass(frozen=True)
class Ranking:
    """The estimator that orders the pool."""

    estimator: str
    direction: str
    """`higher` or `lower`: which end of the estimator is uncertain."""
    spearman: float
    """Of the directed values with the probes' pass rate; negative."""
    values: Floats
    """[P] directed: higher = more uncertain, NaN = unknown; in the scores' order."""
    table: list[dict[str, Any]]
    """`estimator_table` of the probes."""


def rank_pool(scores: Any, probes: Sequence[Outcome], cfg: TriageConfig) -> Ranking:
    """The directed values of the configured estimator, or Uninformative.

    Raises PivotTraceError if the scores do not have the estimator.
    """
    table = estimator_table(scores, probes)
    estimator, direction, rho = _choose(table, probes, cfg)
    return Ranking(estimator, direction, rho, _directed(scores, estimator, direction), table)


def uncertainty(scores: Any, estimator: str, direction: str = "higher") -> dict[str, float]:
    """pt_id -> rank in [0, 1] by one estimator. PivotTraceError if the scores do not have it."""
    ids = [row["pt_id"] for row in rows_of(scores)]
    return dict(
        zip(ids, rank01(_directed(scores, estimator, direction), ids).tolist(), strict=True)
    )


def _directed(scores: Any, estimator: str, direction: str) -> Floats:
    """[P] the estimator's values, higher = more uncertain, NaN = unknown."""
    rows = rows_of(scores)
    names = [n.removeprefix(PREFIX) for n in (rows[0] if rows else {}) if n.startswith(PREFIX)]
    if estimator not in names:
        raise PivotTraceError(
            f"The scores have no estimator '{estimator}', only {', '.join(names) or 'none'}."
        )
    sign = 1.0 if direction == "higher" else -1.0
    return sign * np.array([_value(row, estimator) for row in rows], dtype=np.float64)


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


def auroc(score: ArrayLike, positive: ArrayLike) -> float:
    """Chance that a positive has the higher score, ties half; NaN if one class is empty."""
    concordant, pairs = _concordance(np.asarray(score, float), np.asarray(positive, bool))
    return concordant / pairs if pairs else math.nan


def _concordance(score: Floats, positive: NDArray[np.bool_]) -> tuple[float, int]:
    """(concordant pairs, pairs) of a positive and a negative."""
    n = int(positive.sum())
    pairs = n * (len(positive) - n)
    return float(rankdata(score)[positive].sum()) - n * (n + 1) / 2, pairs


def _within_terciles(score: Floats, positive: NDArray[np.bool_], length: Floats) -> float:
    """AUROC over the pairs of similar length: both in one third of the lengths."""
    thirds = np.array_split(np.argsort(length, kind="stable"), 3)
    parts = [_concordance(score[third], positive[third]) for third in thirds if third.size]
    pairs = sum(n for _, n in parts)
    return sum(c for c, _ in parts) / pairs if pairs else math.nan


def spearman(a: ArrayLike, b: ArrayLike) -> tuple[float, float]:
    """(rho, p value); (NaN, NaN) if one side is constant or there are fewer than 3."""
    x, y = np.asarray(a, float), np.asarray(b, float)
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan, math.nan
    found = spearmanr(x, y)
    return float(found.statistic), float(found.pvalue)


def estimator_table(scores: Any, probes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """One row an estimator, as the probes see it; numbers that do not exist are None.

    estimator; n (probes with a value); auroc: of the raw score for "the majority answer is
    wrong" (no majority counts as wrong), below 0.5 where the direction is `lower`;
    auroc_within_length: the same among prompts of one length tercile; spearman with the pass
    rate and its p_value; direction: `higher` if higher scores are the uncertain ones, `lower`
    if the probes say the opposite, None if undefined. In order of |spearman|, descending.
    """
    known = {outcome.pt_id: outcome for outcome in probes}
    rows = [row for row in rows_of(scores) if row["pt_id"] in known]
    names = [name.removeprefix(PREFIX) for name in (rows[0] if rows else {}) if PREFIX in name]
    table = []
    for name in names:
        kept = [row for row in rows if not math.isnan(_value(row, name))]
        raw = np.array([_value(row, name) for row in kept])
        wrong = np.array([not known[row["pt_id"]].majority_right for row in kept], dtype=bool)
        length = np.array([row["length_mean"] for row in kept], dtype=np.float64)
        rho, p_value = spearman(raw, [known[row["pt_id"]].pass_rate for row in kept])
        table.append(
            {
                "estimator": name,
                "n": len(kept),
                "auroc": _or_none(auroc(raw, wrong)),
                "auroc_within_length": _or_none(_within_terciles(raw, wrong, length)),
                "spearman": _or_none(rho),
                "p_value": _or_none(p_value),
                "direction": None if math.isnan(rho) else ("higher" if rho <= 0 else "lower"),
            }
        )
    return sorted(table, key=lambda row: (-abs(row["spearman"] or 0.0), row["estimator"]))


def _value(row: Mapping[str, Any], estimator: str) -> float:
    value = row[PREFIX + estimator]
    return math.nan if value is None else float(value)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
