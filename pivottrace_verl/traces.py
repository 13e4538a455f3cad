"""From traces to the numbers that estimators and the features of a prompt are made of.

Contract: `calibrate` takes every threshold (tau of the run's detector and of each variant, the
entropy from which a token is a fork) from the calibration rollouts, once; the run's manifest keeps
them, and nothing is counted before. `read_trace` then needs one rollout alone, so what it returns
does not depend on what it is scored with. No threshold and no feature holds a length.

Axes: T generated tokens, L traced layers, H head groups, F features (`pivots.FEATURES`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.estimators import (
    ESTIMATORS,
    VARIANTS,
    GroupRecord,
    TraceRecord,
    pivot_density,
)
from pivottrace_verl.estimators.entropy_forks import QUANTILE
from pivottrace_verl.estimators.records import mean_known
from pivottrace_verl.pivots import DetectorConfig, calibrate_tau, pivots_of, signals

SIGNALS: dict[str, str] = {
    "mass": "response_long_mass",
    "distance": "response_distance",
    "attention_entropy": "entropy",
    "max_prob": "max_prob",
    "prompt_mass": "prompt_mass",
}
"""Attention signals whose mean and spread are features of a prompt, and their name in a trace."""

_SIGNAL_FEATURES = tuple(f"{name}_{what}" for name in SIGNALS for what in ("mean", "std"))
_DENSITIES = (pivot_density.NAME, *VARIANTS)

FEATURE_NAMES: tuple[str, ...] = (*_SIGNAL_FEATURES, *_DENSITIES)
"""Columns `features/<name>` of the scores: what a calibrated estimator may be fitted on."""


@dataclass(frozen=True)
class Thresholds:
    """The frozen detectors, and the entropy from which a token is a fork."""

    detector: DetectorConfig
    variants: Mapping[str, DetectorConfig]
    """By the name of the estimator that counts its pivots."""
    fork_entropy: float
    """In nats."""

    def to_manifest(self) -> dict[str, Any]:
        """The manifest's sections `detector`, `variants` and `forks`."""
        return {
            "detector": self.detector.to_dict(),
            "variants": {name: cfg.to_dict() for name, cfg in self.variants.items()},
            "forks": {"entropy": self.fork_entropy, "quantile": QUANTILE},
        }

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> "Thresholds":
        """What `to_manifest` wrote; PivotTraceError where a section is missing."""
        missing = [name for name in ("detector", "variants", "forks") if name not in manifest]
        if missing:
            raise PivotTraceError(
                f"The manifest has no {', '.join(missing)}, with which the scored parts were made: "
                "score the pool again in a new run directory."
            )
        return cls(
            DetectorConfig.from_dict(manifest["detector"]),
            {name: DetectorConfig.from_dict(v) for name, v in manifest["variants"].items()},
            float(manifest["forks"]["entropy"]),
        )


def calibrate(
    traces: Sequence[tuple[NDArray[Any], NDArray[Any]]], detector: DetectorConfig
) -> Thresholds:
    """All thresholds from the calibration rollouts.

    Args:
        traces: of each rollout its statistics [T, L, H, F] and token entropies [T].
        detector: the run's; a tau it brings along is kept, variants get their own in any case.
    Raises PivotTraceError if there is nothing to calibrate on.
    """
    stats = [stats for stats, _ in traces]
    variants = {
        name: dataclasses.replace(detector, tau=None, **changed)
        for name, changed in VARIANTS.items()
    }
    entropies = np.concatenate([entropy for _, entropy in traces])
    return Thresholds(
        detector if detector.tau is not None else _with_tau(detector, stats),
        {name: _with_tau(cfg, stats) for name, cfg in variants.items()},
        float(np.quantile(entropies.astype(np.float64), QUANTILE)),
    )


def _with_tau(cfg: DetectorConfig, stats: Sequence[NDArray[Any]]) -> DetectorConfig:
    return dataclasses.replace(cfg, tau=calibrate_tau(stats, cfg))


def read_trace(
    stats: NDArray[Any],
    token_entropy: NDArray[Any],
    self_certainty: NDArray[Any],
    thresholds: Thresholds,
) -> TraceRecord:
    """One rollout's trace: statistics [T, L, H, F], token entropy and self-certainty [T], T >= 1.

    The spread of a signal is its standard deviation over the tokens.
    """
    detectors = {pivot_density.NAME: thresholds.detector, **thresholds.variants}
    names = list(dict.fromkeys([*SIGNALS.values(), *(cfg.signal for cfg in detectors.values())]))
    rows = dict(zip(names, np.ascontiguousarray(signals(stats, names).T), strict=True))
    counts = {name: len(pivots_of(rows[cfg.signal], cfg)) for name, cfg in detectors.items()}
    chosen = np.stack([rows[feature] for feature in SIGNALS.values()])
    moments = np.stack([chosen.mean(axis=1), chosen.std(axis=1)], axis=1).ravel()
    return TraceRecord(
        pivots=counts.pop(pivot_density.NAME),
        entropy_mean=float(token_entropy.mean(dtype=np.float64)),
        self_certainty_mean=float(self_certainty.mean(dtype=np.float64)),
        forks=int((token_entropy >= thresholds.fork_entropy).sum()),
        variants=counts,
        signals=dict(zip(_SIGNAL_FEATURES, moments.tolist(), strict=True)),
    )


def features(group: GroupRecord) -> dict[str, float]:
    """`FEATURE_NAMES` of a prompt: means over its traced rollouts; NaN if there are none."""
    traced = group.traced()
    return {
        **{name: mean_known(t.signals[name] for _, t in traced) for name in _SIGNAL_FEATURES},
        **{name: ESTIMATORS[name](group) for name in _DENSITIES},
    }
