"""Pivots per generated token, mean over the rollouts (the abstract's measure)."""

from pivottrace_verl.estimators.records import GroupRecord, mean_known

NAME = "pivot_density"


def score(group: GroupRecord) -> float:
    """In [0, 1]; NaN if no rollout was traced."""
    return mean_known(rollout.per_token(trace.pivots) for rollout, trace in group.traced())
