"""Disagreement of the rollouts: 1 - share of the top answer; a cheap baseline."""

from pivottrace_verl.answers import agreement
from pivottrace_verl.estimators.records import GroupRecord

NAME = "consistency"


def score(group: GroupRecord) -> float:
    """In [0, 1]; unparseable rollouts count as disagreeing."""
    return 1.0 - agreement(group.clusters)
