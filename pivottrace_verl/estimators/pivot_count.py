"""Number of pivots, mean over the rollouts (DE-Venus' measure; grows with length)."""

from pivottrace_verl.estimators.records import GroupRecord, mean_known

NAME = "pivot_count"


def score(group: GroupRecord) -> float:
    """At least 0; NaN if no rollout was traced."""
    return mean_known(trace.pivots for _, trace in group.traced())
