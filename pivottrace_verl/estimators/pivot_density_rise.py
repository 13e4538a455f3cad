"""Pivots per token of the rising edge of long-range attention: turns towards older tokens alone."""

from pivottrace_verl.estimators.records import GroupRecord, variant_density

NAME = "pivot_density_rise"
DETECTOR = {"signal": "response_long_mass", "change": "rise"}
"""Fields in which its detector differs from the run's; it has a tau of its own."""


def score(group: GroupRecord) -> float:
    """In [0, 1]; NaN if no rollout was traced."""
    return variant_density(group, NAME)
