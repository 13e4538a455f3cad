"""Self-certainty (arXiv 2502.18581), negated so that higher means more uncertain.

Of one token it is KL(U || p) = -1/V sum over the vocabulary of log(V p(v)), with p the full
next-token distribution at temperature 1 and U uniform over its V words (masked ones left out);
of a rollout the mean over its tokens; here the mean over the rollouts. It is computed in the
engine from the logits that chose each token (`attention.reference.token_statistics`), not from
a few top tokens.

Every word counts alike, so the average is made of the tail: words never used in the pool, whose
logits training hardly touched, weigh as much as the ones in question. On models with a large
vocabulary and a small domain that tail can drown the signal; `entropy` does not have it.
"""

from pivottrace_verl.estimators.records import GroupRecord, mean_known

NAME = "self_certainty"


def score(group: GroupRecord) -> float:
    """In nats, at most 0 (a uniform distribution, the least certain); NaN if nothing was traced."""
    return -mean_known(trace.self_certainty_mean for _, trace in group.traced())
