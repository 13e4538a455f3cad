"""Pivots per token of attention distance (clipped at the window) instead of mass beyond it."""

from pivottrace_verl.estimators.records import GroupRecord, variant_density

NAME = "pivot_density_distance"
DETECTOR = {"signal": "response_distance", "change": "abs"}
"""Fields in which its detector differs from the run's; it has a tau of its own."""


def score(group: GroupRecord) -> float:
    """In [0, 1]; NaN if no rollout was traced."""
    return variant_density(group, NAME)
