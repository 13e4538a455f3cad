"""Pivots per token of long-range mass with the prompt's keys, which the default leaves out."""

from pivottrace_verl.estimators.records import GroupRecord, variant_density

NAME = "pivot_density_context"
DETECTOR = {"signal": "long_mass", "change": "abs"}
"""Fields in which its detector differs from the run's; it has a tau of its own."""


def score(group: GroupRecord) -> float:
    """In [0, 1]; NaN if no rollout was traced."""
    return variant_density(group, NAME)
