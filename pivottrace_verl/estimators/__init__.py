"""Prompt-level uncertainties, one a file; plain functions over a `GroupRecord`.

Contract: `score(GroupRecord) -> float`, higher = more uncertain as the estimator's author meant
it; the probes decide the direction that is used. Raw values, not ranks; NaN = unknown. A new
estimator is a file and a line here.
"""

from collections.abc import Callable, Mapping
from typing import Any

from pivottrace_verl.estimators import (
    coe,
    consistency,
    cot_kinetics,
    entropy,
    entropy_forks,
    length,
    nll,
    pivot_count,
    pivot_density,
    pivot_density_context,
    pivot_density_distance,
    pivot_density_distance_rise,
    pivot_density_rise,
    random,
    self_certainty,
)
from pivottrace_verl.estimators.records import GroupRecord, RolloutRecord, TraceRecord

_VARIANTS = (
    pivot_density_rise,
    pivot_density_distance,
    pivot_density_distance_rise,
    pivot_density_context,
)
_HIDDEN_STATES = (coe, cot_kinetics)

ESTIMATORS: dict[str, Callable[[GroupRecord], float]] = {
    module.NAME: module.score
    for module in (
        pivot_density,
        pivot_count,
        *_VARIANTS,
        entropy,
        entropy_forks,
        self_certainty,
        nll,
        consistency,
        length,
        *_HIDDEN_STATES,
        random,
    )
}

VARIANTS: dict[str, Mapping[str, Any]] = {module.NAME: module.DETECTOR for module in _VARIANTS}
"""Estimators that count the pivots of another detector, and in which fields it differs."""

NEED_HIDDEN_STATES: tuple[str, ...] = tuple(module.NAME for module in _HIDDEN_STATES)
"""Estimators that are NaN everywhere unless the pool is scored with hidden states."""

NEED_TRACES: tuple[str, ...] = tuple(
    module.NAME
    for module in (pivot_density, pivot_count, *_VARIANTS, entropy, entropy_forks, self_certainty)
)
"""Estimators that are NaN where no rollout was traced."""

__all__ = [
    "ESTIMATORS",
    "NEED_HIDDEN_STATES",
    "NEED_TRACES",
    "VARIANTS",
    "GroupRecord",
    "RolloutRecord",
    "TraceRecord",
]
