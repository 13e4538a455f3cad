"""Prompt-level uncertainty, one estimator a file.

Contract: `score(GroupRecord) -> float`, higher = more uncertain as the estimator's author meant
it; the probes decide the direction that is used. Raw values, not ranks; NaN = unknown. A new
estimator is a file and a line here.
"""

from collections.abc import Callable

from pivottrace_verl.estimators import (
    consistency,
    entropy,
    length,
    pivot_count,
    pivot_density,
    random,
)
from pivottrace_verl.estimators.records import GroupRecord, RolloutRecord

ESTIMATORS: dict[str, Callable[[GroupRecord], float]] = {
    module.NAME: module.score
    for module in (pivot_density, pivot_count, entropy, consistency, length, random)
}

__all__ = ["ESTIMATORS", "GroupRecord", "RolloutRecord"]
