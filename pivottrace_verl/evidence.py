"""Evidence: what the probes say about every estimator.

Contract: estimators are assessed on the probes that have a value; fitted ones by out-of-fold
values, in the one direction they have learned. `random` is shown as a yardstick and is not among
those tried. Nothing is decided here: `ranking` chooses.

Axes: N probes, E estimators.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from pivottrace_verl.calibration import Floats, Outcome
from pivottrace_verl.chance import Deals, deal, p_values
from pivottrace_verl.fitted import FITTED, columns_for, design, why_not
from pivottrace_verl.probe_statistics import aurocs, aurocs_within, known, one
from pivottrace_verl.score_columns import Probed, as_table, probe_columns

RANDOM = "random"
"""The baseline: shown, never chosen. It may follow 64 probes by chance; it serves nobody."""


@dataclass(frozen=True)
class Evidence:
    """All that the probes say about the estimators."""

    probed: Probed
    deals: Deals
    scores: dict[str, Floats]
    """[N] of every estimator; of fitted ones, out of fold."""
    not_offered: dict[str, str]
    """Fitted estimator -> the sentence why there is none."""
    table: list[dict[str, Any]]
    """See `estimator_table`."""

    def p_values(self, direction: str | None = None) -> tuple[dict[str, float], dict[str, float]]:
        """p values of the Spearman correlations, and the same adjusted for all estimators tried,
        by name; NaN where there is none. Two-sided, or one-sided in a given direction."""
        return _p_values(self.deals, self.deals.spearman, direction)

    def auroc_p_values(self) -> tuple[dict[str, float], dict[str, float]]:
        """The same of the AUROCs, both directions allowed."""
        # The AUROC rises where the Spearman correlation falls.
        return _p_values(self.deals, -self.deals.auroc, None)


def gather(scores: Any, probes: Iterable[Outcome]) -> Evidence:
    """Fit what can be fitted, deal the outcomes, and tabulate every estimator."""
    probed = probe_columns(as_table(scores), probes)
    refusals = {name: why_not(name, probed) for name in FITTED}
    designs = {
        name: design(probed.columns, columns_for(name, list(probed.columns)))
        for name, refusal in refusals.items()
        if refusal is None
    }
    deals = deal(probed.scores, designs, probed.pass_rate, probed.wrong)
    values = {**probed.scores, **deals.out_of_fold}
    not_offered = {name: refusal for name, refusal in refusals.items() if refusal is not None}
    return Evidence(probed, deals, values, not_offered, _table(probed, deals, values))


def estimator_table(scores: Any, probes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """One row an estimator, as the probes see it; numbers that do not exist are None.

    estimator; n (probes with a value; 0: not scored); auroc: of the raw score for "the majority
    answer is wrong" (no majority counts as wrong), below 0.5 where the direction is `lower`;
    auroc_within_length: the same among prompts of one length tercile; spearman with the pass
    rate; p_value: of it by permutation, two-sided (one-sided for fitted ones); p_adjusted: the same
    for the number of estimators tried (None for random); direction: `higher` if higher scores are
    the uncertain ones, `lower` if the probes say the opposite, None if undefined. In order of
    `strength`, descending; of equal ones those first that need no fit.
    """
    return gather(scores, probes).table


def strength(row: dict[str, Any]) -> float:
    """Size of the Spearman correlation, in the only direction that a fitted estimator has."""
    rho = float(row["spearman"] or 0.0)
    return -rho if row["estimator"] in FITTED else abs(rho)


def side(name: str, direction: str | None) -> int:
    """Which Spearman counts for an estimator: negative ones, positive ones, or (0) both. A fitted
    one has learned its direction."""
    if name in FITTED or direction == "higher":
        return -1
    return 1 if direction == "lower" else 0


def _p_values(
    deals: Deals, statistic: Floats, direction: str | None
) -> tuple[dict[str, float], dict[str, float]]:
    sides = np.array([side(name, direction) for name in deals.names], dtype=np.int64)
    tried = np.array([name != RANDOM for name in deals.names], dtype=bool)
    p, _ = p_values(statistic, sides)
    adjusted = np.full(len(sides), np.nan)
    adjusted[tried] = p_values(statistic[:, tried], sides[tried])[1]
    return (
        dict(zip(deals.names, p.tolist(), strict=True)),
        dict(zip(deals.names, adjusted.tolist(), strict=True)),
    )


def _table(probed: Probed, deals: Deals, values: dict[str, Floats]) -> list[dict[str, Any]]:
    p, adjusted = _p_values(deals, deals.spearman, None)
    table = []
    for e, name in enumerate(deals.names):
        seen = known(values[name])
        score, wrong, length = values[name][seen], probed.wrong[seen], probed.length[seen]
        once = np.ones((1, len(score)))
        rho = float(deals.spearman[0, e])
        direction = None if math.isnan(rho) else ("higher" if rho <= 0 else "lower")
        table.append(
            {
                "estimator": name,
                "n": len(score),
                "auroc": one(aurocs(once, score, wrong)),
                "auroc_within_length": one(aurocs_within(once, score, wrong, length)),
                "spearman": None if direction is None else rho,
                "p_value": none_if_nan(p[name]),
                "p_adjusted": none_if_nan(adjusted[name]),
                "direction": "higher" if direction and name in FITTED else direction,
            }
        )
    return sorted(table, key=_order)


def _order(row: dict[str, Any]) -> tuple[float, bool, str]:
    """The strongest first; of equal ones, those that need no fit."""
    return -round(strength(row), 9), row["estimator"] in FITTED, row["estimator"]


def none_if_nan(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
