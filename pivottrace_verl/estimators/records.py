"""What an estimator sees of a prompt: plain numbers of its rollouts, no text, no label.

Axes: G rollouts of a prompt.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from pivottrace_verl.answers import Clusters


@dataclass(frozen=True)
class RolloutRecord:
    """One rollout. None marks what was not captured."""

    n_tokens: int
    pivots: int | None
    """Number of pivots; None if the rollout was not traced."""
    entropy_mean: float | None
    """Mean entropy of the token distributions, in nats; None if not traced."""
    logprob_mean: float | None
    """Mean log-probability of the sampled tokens."""
    answer: str | None
    """None if unparseable."""
    truncated: bool


@dataclass(frozen=True)
class GroupRecord:
    """The rollouts of one prompt."""

    rollouts: list[RolloutRecord]
    clusters: Clusters
    pt_id: str
    seed: int
    """The run's seed, for estimators that draw."""


def mean_known(values: Iterable[float | None]) -> float:
    """Mean over what was captured; NaN (uncertainty unknown) if nothing was."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan
