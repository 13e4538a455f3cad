"""Ranking: which estimator orders the pool, and in which direction.

Contract: the probes decide, and only what chance does not explain counts. An estimator they do not
confirm is refused (`Uninformative`), naming the one that would serve. Values are raw, higher = more
uncertain after the direction is applied, NaN = unknown.

    ranking = rank_pool(scores, probes, TriageConfig())
    ranking.values, ranking.estimator, ranking.direction, ranking.spearman

Confirmed means: the Spearman correlation with the pass rate is at least `min_spearman` in size and
its permutation p value at most `alpha`; one-sided where the direction is given, two-sided where the
probes choose it. Where the probes choose the estimator, too (`auto`, and the one a refusal names),
it has to pass with the p value adjusted for all that were tried; the strongest that does is taken.

Measured on synthetic pools, 64 probes: the size alone passed an uninformative estimator in 42% of
600 pools, the p value in 5% of 2,500; `auto` found something to take among 9 uninformative
estimators and 2 fitted ones in 3% of 400. Taking the strongest is no worse than the
one-standard-error rule with cheap estimators first: the chosen one's Spearman on the rest of the
pool was 0.70 against 0.71 where consistency knew all, 0.72 against 0.71 where pivots did, 0.54
against 0.51 where several knew something (60 pools each).

Axes: P prompts, N probes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pivottrace_verl.calibration import Floats, Outcome, rank01
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.evidence import RANDOM, Evidence, estimator_table, gather, strength
from pivottrace_verl.fitted import (
    FITTED,
    FOLDS,
    columns_for,
    design,
    fit,
    folds,
    out_of_fold,
    pool_values,
    why_not,
)
from pivottrace_verl.plan import AUTO, TriageConfig
from pivottrace_verl.probe_statistics import auroc, known, spearman
from pivottrace_verl.score_columns import as_table, estimator_values, hint, ids_of, probe_columns

__all__ = [
    "Ranking",
    "Uninformative",
    "auroc",
    "chosen_out_of_fold",
    "estimator_table",
    "problem",
    "rank_pool",
    "serving",
    "spearman",
    "uncertainty",
]


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

    Raises PivotTraceError if the scores do not have the estimator, or no value of it.
    """
    pool = as_table(scores)
    evidence = gather(pool, probes)
    estimator, direction, rho = _choose(evidence, cfg)
    if estimator in FITTED:
        values = pool_values(pool, evidence.probed, estimator)
    else:
        values = _directed(estimator_values(pool, estimator), direction)
    return Ranking(estimator, direction, rho, values, evidence.table)


def uncertainty(
    scores: Any, estimator: str, direction: str = "higher", probes: Sequence[Outcome] = ()
) -> dict[str, float]:
    """pt_id -> rank in [0, 1] by one estimator; a fitted one needs the probes' outcomes.

    PivotTraceError if the scores do not have it, or no value of it, or the probes cannot give it.
    """
    pool = as_table(scores)
    if estimator in FITTED:
        probed = probe_columns(pool, probes)
        refusal = why_not(estimator, probed)
        if refusal is not None:
            raise PivotTraceError(refusal)
        values = pool_values(pool, probed, estimator)
    else:
        values = estimator_values(pool, estimator)
    ids = ids_of(pool)
    return dict(zip(ids, rank01(_directed(values, direction), ids).tolist(), strict=True))


def _directed(values: Floats, direction: str) -> Floats:
    return values if direction == "higher" else -values


def serving(evidence: Evidence, cfg: TriageConfig, direction: str = AUTO) -> list[dict[str, Any]]:
    """Rows of the table that the probes confirm though all were tried, the strongest first.

    A given direction leaves only estimators that point there, and tests them one-sided.
    """
    given = None if direction == AUTO else direction
    adjusted = evidence.p_values(given)[1]
    return [
        row
        for row in evidence.table
        if adjusted[row["estimator"]] <= cfg.alpha
        and strength(row) >= cfg.min_spearman
        and given in (None, row["direction"])
    ]


def chosen_out_of_fold(evidence: Evidence) -> float:
    """Spearman with the pass rate of *choosing* the strongest estimator, negative is good.

    Estimator and direction are chosen on four fifths of the probes and judged on the last fifth;
    mean over the folds of repeated cross-validations, in which a choice that ties all its fold
    counts 0. The correlation of the chosen one on all probes is larger by the luck of the choice.
    NaN with fewer than 15 probes, whose folds would have fewer than 3.
    """
    probed = evidence.probed
    if len(probed.pass_rate) < 3 * FOLDS:
        return math.nan
    found = []
    for rest, held in folds(len(probed.pass_rate), seed=1):
        candidates = []
        for name in evidence.deals.names:
            if name == RANDOM:
                continue
            if name in FITTED:
                x = design(probed.columns, columns_for(name, list(probed.columns)))
                rate = probed.pass_rate[:, None]
                learned = out_of_fold(x[rest], rate[rest])[:, 0]
                values = fit(x[rest], rate[rest]).values(x[held])[:, 0]
                rho, sign = _known_spearman(learned, probed.pass_rate[rest]), 1.0
            else:
                score = evidence.scores[name]
                rho = _known_spearman(score[rest], probed.pass_rate[rest])
                sign = -1.0 if rho > 0 else 1.0
                values = score[held]
            candidates.append((sign * rho, name, sign * values))
        if candidates:
            best = min(candidates, key=lambda c: c[:2])
            found.append(_known_spearman(best[2], probed.pass_rate[held]))
    return float(np.mean(found)) if found else math.nan


def _known_spearman(score: Floats, rate: Floats) -> float:
    """0 where it does not exist."""
    seen = known(score)
    rho = spearman(score[seen], rate[seen])[0]
    return 0.0 if math.isnan(rho) else rho


def problem(evidence: Evidence, cfg: TriageConfig, row: dict[str, Any]) -> str | None:
    """Why the probes do not confirm an estimator, given its row of the table; None if they do."""
    n, rho = len(evidence.probed.pass_rate), _rho(row, cfg)
    if row["n"] == 0:
        return f"it is not scored: none of the {n} probes has a value{hint(row['estimator'])}"
    if row["spearman"] is None:
        return f"it has the same value on all {row['n']} probes that have one"
    its = f"its Spearman correlation with the pass rate of the {row['n']} probes is {rho:+.3f}"
    if rho > -cfg.min_spearman:
        return f"{its}, but must be at most {-cfg.min_spearman:g}"
    p = evidence.p_values(None if cfg.direction == AUTO else cfg.direction)[0][row["estimator"]]
    if p > cfg.alpha:
        return f"{its}, but chance alone gives as much with p = {p:.2f}, above {cfg.alpha:g}"
    return None


def _direction(row: dict[str, Any], cfg: TriageConfig) -> str:
    return cfg.direction if cfg.direction != AUTO else (row["direction"] or "higher")


def _rho(row: dict[str, Any], cfg: TriageConfig) -> float:
    """Spearman with the pass rate in the direction that would be used; negative is good."""
    return float(row["spearman"] or 0.0) * (1.0 if _direction(row, cfg) == "higher" else -1.0)


def _choose(evidence: Evidence, cfg: TriageConfig) -> tuple[str, str, float]:
    """(estimator, direction, its Spearman in that direction), or Uninformative."""
    table, n = evidence.table, len(evidence.probed.pass_rate)
    rates = set(evidence.probed.pass_rate.tolist())
    if len(rates) == 1:
        raise Uninformative(
            f"All {n} probes have the same pass rate, {rates.pop():.2f}, so no ranking "
            "can be calibrated on them.",
            None,
            table,
        )
    if cfg.estimator == AUTO:
        found = serving(evidence, cfg, cfg.direction)
        if not found:
            tried = sum(row["p_adjusted"] is not None for row in table)
            raise Uninformative(
                f"No estimator follows the pass rates of the {n} probes: no Spearman correlation "
                f"is at least {cfg.min_spearman:.2f} in size and beyond chance (p at most "
                f"{cfg.alpha:g} after correcting for the {tried} tried).",
                None,
                table,
            )
        return found[0]["estimator"], found[0]["direction"], -strength(found[0])
    name = cfg.estimator
    if name in evidence.not_offered:
        raise PivotTraceError(evidence.not_offered[name])
    row = next((row for row in table if row["estimator"] == name), None)
    if row is None:
        names = ", ".join(row["estimator"] for row in table)
        raise PivotTraceError(f"The scores have no estimator '{name}', only {names}.")
    trouble = problem(evidence, cfg, row)
    if trouble is None:
        return name, _direction(row, cfg), _rho(row, cfg)
    best = next(iter(serving(evidence, cfg)), None)
    advice = "no estimator in the scores does better."
    if best is not None:
        advice = (
            f"use '{best['estimator']}' (Spearman {best['spearman']:+.2f}, direction "
            f"{best['direction']}) instead."
        )
    raise Uninformative(
        f"The estimator '{name}' (direction {_direction(row, cfg)}) does not tell where the policy "
        f"fails: {trouble}; {advice}",
        None if best is None else best["estimator"],
        table,
    )
