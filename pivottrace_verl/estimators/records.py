"""What an estimator sees of a prompt: plain numbers of its rollouts, no text, no label.

Axes: G rollouts of a prompt, L layers of the model, D hidden size.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from pivottrace_verl.answers import Clusters


@dataclass(frozen=True)
class TraceRecord:
    """What the trace of one rollout says; made by `traces.read_trace`."""

    pivots: int
    """Number of pivots of the run's detector."""
    entropy_mean: float
    """Mean entropy of the token distributions, in nats."""
    self_certainty_mean: float
    """Mean KL(uniform || token distribution), in nats."""
    forks: int
    """Number of tokens whose entropy reaches the pool's threshold."""
    variants: Mapping[str, int] = field(default_factory=dict)
    """Number of pivots of each variant of the detector, by the name of its estimator."""
    signals: Mapping[str, float] = field(default_factory=dict)
    """Mean and spread over the tokens of the attention signals, by the name of the feature."""


@dataclass(frozen=True)
class RolloutRecord:
    """One rollout. None marks what was not captured."""

    n_tokens: int
    logprob_mean: float | None
    """Mean log-probability of the sampled tokens."""
    answer: str | None
    """None if unparseable or timed out; the group's clusters tell which."""
    truncated: bool
    trace: TraceRecord | None = None
    """None if the rollout was not traced."""
    layer_states: NDArray[Any] | None = None
    """[L + 1, D] the hidden states after each layer, embeddings first, mean over the generated
    tokens; None unless they were asked for."""

    def per_token(self, count: int) -> float:
        """A count of tokens as a share of the rollout's, in [0, 1]."""
        return count / max(self.n_tokens, 1)


@dataclass(frozen=True)
class GroupRecord:
    """The rollouts of one prompt."""

    rollouts: list[RolloutRecord]
    clusters: Clusters
    pt_id: str
    seed: int
    """The run's seed, for estimators that draw."""

    def traced(self) -> list[tuple[RolloutRecord, TraceRecord]]:
        """The rollouts that have a trace."""
        return [(r, r.trace) for r in self.rollouts if r.trace is not None]


def mean_known(values: Iterable[float | None]) -> float:
    """Mean over what was captured; NaN (uncertainty unknown) if nothing was."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def variant_density(group: GroupRecord, name: str) -> float:
    """Pivots per token of a variant of the detector, mean over the traced rollouts."""
    return mean_known(rollout.per_token(t.variants[name]) for rollout, t in group.traced())
