"""Pivots per generated token, mean over the rollouts (the abstract's measure)."""

from pivottrace_verl.estimators.records import GroupRecord, mean_known

NAME = "pivot_density"


def score(group: GroupRecord) -> float:
    """In [0, 1]; NaN if no rollout was traced."""
    return mean_known(
        None if r.pivots is None else r.pivots / max(r.n_tokens, 1) for r in group.rollouts
    )
