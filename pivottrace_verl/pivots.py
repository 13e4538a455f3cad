"""Pivots: the places of a rollout where its long-range attention changes abruptly.

Contract: a trace is a float array [T, L, H, F]; row i describes the query that emitted generated
token i, F runs over `FEATURES`. One threshold tau serves the whole pool: taken per rollout it
would make the density a constant, which carries nothing.

    cfg = replace(cfg, tau=calibrate_tau(traces, cfg))
    find_pivots(trace, cfg)          # token indices

The detector is this project's reading of PivotTrace (arXiv 2606.04503), not its authors' code;
every choice is a named field of `DetectorConfig`.

Axes: T generated tokens, L traced layers, H head groups, F features.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pivottrace_verl.errors import PivotTraceError

FEATURES: tuple[str, ...] = (
    "lse",
    "entropy",
    "max_prob",
    "sink_mass",
    "prompt_mass",
    "long_mass",
    "distance",
    "response_long_mass",
    "response_distance",
    *(f"bucket_{b}" for b in range(16)),
)
MANY_TOKENS = 4096
"""Signals that are longer on average are looked through one by one: joined, they would not stay in
a processor's nearer caches."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class DetectorConfig:
    """How a trace becomes pivots; frozen in the run's manifest once calibrated."""

    signal: str = "response_long_mass"
    """The feature that is followed, averaged over layers and head groups."""
    change: str = "abs"
    """`abs`: any change counts; `rise`: only a turn towards older tokens does."""
    refractory: int = 5
    """Two pivots of a rollout are at least this many tokens apart."""
    tau_quantile: float = 0.95
    """tau is this quantile of all changes in the calibration rollouts together."""
    window: int = 32
    """W: keys at least this many tokens back are long range (used when the trace is captured)."""
    sink: int = 4
    """S: the first positions, left out of every distance (used when the trace is captured)."""
    tau: float | None = None
    """The threshold; None until `calibrate_tau` has found it."""
    skip_first: int = 1
    """The first changes, set to 0: token 0 has no predecessor."""

    def __post_init__(self) -> None:
        if self.signal not in FEATURES:
            raise PivotTraceError(
                f"The detector's signal is '{self.signal}', but a trace holds only "
                f"{', '.join(FEATURES[:9])} and bucket_0 to bucket_15."
            )
        if self.change not in ("abs", "rise"):
            raise PivotTraceError(
                f"The detector's change is '{self.change}', but must be 'abs' or 'rise'."
            )
        if not 0.0 < self.tau_quantile < 1.0:
            raise PivotTraceError(
                f"The detector's tau_quantile is {self.tau_quantile}, but must lie between 0 and 1."
            )
        if self.refractory < 1 or self.skip_first < 1 or self.window < 1 or self.sink < 0:
            raise PivotTraceError(
                "The detector's refractory, skip_first and window must be at least 1 and its sink "
                f"at least 0, not {self.refractory}, {self.skip_first}, {self.window} and "
                f"{self.sink}."
            )
        if self.tau is not None and not (np.isfinite(self.tau) and self.tau >= 0):
            raise PivotTraceError(f"The detector's tau is {self.tau}, but must not be negative.")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values; `from_dict` gives the same detector back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DetectorConfig":
        """The detector of a manifest; unknown fields raise PivotTraceError."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise PivotTraceError(f"The detector has no field named {', '.join(unknown)}.")
        return cls(**values)


def signals(trace: NDArray[Any], names: Sequence[str]) -> Floats:
    """[T, L, H, F] -> [T, len(names)]: those features, each the mean over layers and head groups.

    Raises ValueError if the trace has another shape or holds NaN or infinity there: a broken
    capture must not look like a rollout without pivots.
    """
    if trace.ndim != 4 or trace.shape[3] != len(FEATURES):
        raise ValueError(f"A trace is [T, L, H, {len(FEATURES)}], not {list(trace.shape)}.")
    if trace.shape[0] == 0:
        return np.zeros((0, len(names)))
    if trace.shape[1] == 0 or trace.shape[2] == 0:
        raise ValueError(f"A trace needs a layer and a head group, not {list(trace.shape)}.")
    columns = [FEATURES.index(name) for name in names]
    total = np.zeros((trace.shape[0], len(names)))
    # Summed in one fixed order, so that a feature has the same bits alone and among others.
    for rows in trace.reshape(len(trace), -1, len(FEATURES)).transpose(1, 0, 2):
        total += rows[:, columns]
    total /= trace.shape[1] * trace.shape[2]
    broken = [name for name, row in zip(names, total.T, strict=True) if not np.isfinite(row).all()]
    if broken:
        raise ValueError(f"The trace's {', '.join(broken)} is not finite everywhere.")
    return total


def signal(trace: NDArray[Any], cfg: DetectorConfig) -> Floats:
    """[T, L, H, F] -> [T]: the followed feature; see `signals`."""
    return signals(trace, [cfg.signal])[:, 0]


def changes(x: NDArray[Any], cfg: DetectorConfig) -> Floats:
    """[T] -> [T]: size of the step into each token; the first `skip_first` are 0."""
    step = np.zeros(len(x), dtype=np.float64)
    if len(x) > 1:
        step[1:] = np.diff(np.asarray(x, dtype=np.float64))
    step = np.abs(step) if cfg.change == "abs" else np.maximum(step, 0.0)
    step[: cfg.skip_first] = 0.0
    return step


def calibrate_tau(traces: Iterable[NDArray[Any]], cfg: DetectorConfig) -> float:
    """One quantile over all changes of all calibration rollouts pooled, leading zeros left out."""
    pooled = [changes(signal(trace, cfg), cfg)[cfg.skip_first :] for trace in traces]
    values = np.concatenate(pooled) if pooled else np.zeros(0)
    if values.size == 0:
        raise PivotTraceError(
            "The pivot threshold cannot be calibrated: none of the calibration rollouts is longer "
            f"than {cfg.skip_first} token(s)."
        )
    return float(np.quantile(values, cfg.tau_quantile))


def find_pivots(trace: NDArray[Any], cfg: DetectorConfig) -> NDArray[np.int64]:
    """Token indices, ascending, whose change reaches tau and is the largest near by.

    Near by means fewer than `refractory` tokens away; of equal changes the earliest wins.
    Raises PivotTraceError if the detector has no tau yet.
    """
    return pivots_of(signal(trace, cfg), cfg)


def pivots_of(row: NDArray[Any], cfg: DetectorConfig) -> NDArray[np.int64]:
    """`find_pivots` from the followed signal [T] itself."""
    return np.flatnonzero(_is_pivot(changes(row, cfg), cfg))


def counts_of(rows: Sequence[NDArray[Any]], cfg: DetectorConfig) -> list[int]:
    """Number of pivots in each followed signal [T]: of many short ones faster than one by one."""
    if sum(map(len, rows)) >= MANY_TOKENS * len(rows):
        return [len(pivots_of(row, cfg)) for row in rows]
    # So far apart, no change is near one of the next signal.
    apart = np.zeros(cfg.refractory)
    found = _is_pivot(np.concatenate([x for row in rows for x in (changes(row, cfg), apart)]), cfg)
    ends = np.cumsum([len(row) + len(apart) for row in rows])
    counts: list[int] = np.diff(np.cumsum(found)[ends - 1], prepend=0).tolist()
    return counts


def _is_pivot(step: Floats, cfg: DetectorConfig) -> NDArray[np.bool_]:
    """[T] changes -> [T]."""
    if cfg.tau is None:
        raise PivotTraceError("The detector has no tau yet: calibrate it before counting pivots.")
    found: NDArray[np.bool_] = (step >= cfg.tau) & (step > 0.0)
    for away in range(1, min(cfg.refractory, len(step))):
        found[away:] &= step[:-away] < step[away:]
        found[:-away] &= step[away:] <= step[:-away]
    return found


def count(trace: NDArray[Any], cfg: DetectorConfig) -> int:
    """Number of pivots in the rollout."""
    return len(find_pivots(trace, cfg))


def density(trace: NDArray[Any], cfg: DetectorConfig) -> float:
    """Pivots per generated token, in [0, 1]; 0 for an empty rollout."""
    return count(trace, cfg) / trace.shape[0] if trace.shape[0] else 0.0
