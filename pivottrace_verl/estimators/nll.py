"""Mean negative log-probability of the sampled tokens, mean over the rollouts; a cheap baseline."""

from pivottrace_verl.estimators.records import GroupRecord, mean_known

NAME = "nll"


def score(group: GroupRecord) -> float:
    """In nats, at least 0."""
    return -mean_known(rollout.logprob_mean for rollout in group.rollouts)
