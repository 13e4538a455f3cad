"""Share of forking tokens (arXiv 2506.01939): tokens where the model hesitates between ways on.

The paper calls the 20% of tokens with the highest entropy forking tokens. The threshold is one
constant for the pool, that quantile over the calibration rollouts: taken per rollout it would make
the share a constant.
"""

from pivottrace_verl.estimators.records import GroupRecord, mean_known

NAME = "entropy_forks"
QUANTILE = 0.8
"""Tokens at or above this quantile of the calibration rollouts' entropies are forks."""


def score(group: GroupRecord) -> float:
    """In [0, 1]; NaN if no rollout was traced."""
    return mean_known(rollout.per_token(trace.forks) for rollout, trace in group.traced())
