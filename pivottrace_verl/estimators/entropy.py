"""Mean entropy of the token distributions, mean over the rollouts; a cheap baseline."""

from pivottrace_verl.estimators.records import GroupRecord, mean_known

NAME = "entropy"


def score(group: GroupRecord) -> float:
    """In nats; NaN if no rollout was traced."""
    return mean_known(trace.entropy_mean for _, trace in group.traced())
