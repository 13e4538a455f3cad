"""Mean number of generated tokens; the baseline every attention count must beat."""

from pivottrace_verl.estimators.records import GroupRecord, mean_known

NAME = "length"


def score(group: GroupRecord) -> float:
    """In tokens."""
    return mean_known(r.n_tokens for r in group.rollouts)
