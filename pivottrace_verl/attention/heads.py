"""Which layers and heads look far back: chosen once on rollouts of the run, then frozen.

Contract: `pivottrace calibrate` measures every head of a few layers in the middle of the model
(`replay.head_distances`), `choose` keeps the farthest-looking ones, `write_choice` freezes them in
RUN/capture.json, and `score` and `train` capture those only. Without the file the default stands:
two layers, the mean over all heads, which did better on the small models this project measured.

The rule is arXiv 2510.13554's: layers evenly in the middle third, heads by their mean
attention-weighted distance. Measured on everything, it picks sink heads: a head that keeps almost
all of its attention on the first positions has a distance made of noise. So the sink is taken out
of the distance, and heads above `max_sink` are left out.

Axes: L candidate layers, H query heads.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.files import read_object, write_json_atomic
from pivottrace_verl.run_files import RunFiles

FILE = "capture.json"


@dataclass(frozen=True)
class HeadConfig:
    """How layers and heads are chosen; kept in the file."""

    rollouts: int = 96
    """Rollouts that are measured; one each of as many prompts, spread over the pool."""
    n_layers: int = 5
    """Candidate layers, at most."""
    share: float = 0.3
    """Of all heads of the candidate layers, the share that is kept."""
    sink: int = 4
    """S: the first positions, left out of the distance."""
    max_sink: float = 0.9
    """A head whose mean attention on the sink is above this is not kept."""
    response_only: bool = False
    """Measure attention on response tokens only: a few-shot prompt counts as far away."""

    def __post_init__(self) -> None:
        if self.rollouts < 1 or self.n_layers < 1 or self.sink < 0:
            raise PivotTraceError(
                "The choice of heads needs at least 1 rollout, 1 layer and a sink of 0 or more, "
                f"not {self.rollouts}, {self.n_layers} and {self.sink}."
            )
        if not 0 < self.share <= 1 or not 0 < self.max_sink <= 1:
            raise PivotTraceError(
                "The share of heads and the largest sink must lie above 0 and not above 1, not "
                f"{self.share} and {self.max_sink}."
            )


def candidate_layers(available: Sequence[int], n_layers: int) -> tuple[int, ...]:
    """Up to `n_layers` of the `available` layers, evenly in their middle third."""
    n = len(available)
    if n == 0:
        raise PivotTraceError("The model has no full attention layer that can be traced.")
    places = {int(n / 3 + n / 3 * (i + 0.5) / n_layers) for i in range(n_layers)}
    return tuple(available[place] for place in sorted(places))


def choose(
    layers: Sequence[int],
    distance: NDArray[Any],
    sink_mass: NDArray[Any],
    config: HeadConfig,
) -> dict[int, tuple[int, ...]]:
    """Layer -> its kept heads; layers without one are not there.

    Args:
        layers: [L] candidate layers.
        distance: [L, H] mean distance of each head, in tokens.
        sink_mass: [L, H] mean attention on the sink.
    Of equally far heads the earlier is kept. Raises PivotTraceError if every head is a sink head.
    """
    kept = math.ceil(config.share * distance.size)
    order = np.argsort(-distance, axis=None, kind="stable")
    order = order[sink_mass.ravel()[order] <= config.max_sink][:kept]
    if not len(order):
        raise PivotTraceError(
            f"All {distance.size} heads of layers {', '.join(map(str, layers))} keep more than "
            f"{config.max_sink:.0%} of their attention on the first {config.sink} positions: "
            "raise --max-sink, or score without a choice of heads."
        )
    n_heads = distance.shape[1]
    chosen = {
        layer: tuple(int(h) for h in sorted(order[order // n_heads == i] % n_heads))
        for i, layer in enumerate(layers)
    }
    return {layer: heads for layer, heads in chosen.items() if heads}


def write_choice(
    run: RunFiles,
    chosen: Mapping[int, Sequence[int]],
    layers: Sequence[int],
    distance: NDArray[Any],
    sink_mass: NDArray[Any],
    config: HeadConfig,
) -> dict[str, Any]:
    """Freeze a choice in RUN/capture.json, with what it was made from; returns what is written."""
    content = {
        "made_from": _made_from(run),
        "settings": dataclasses.asdict(config),
        "capture": {"layers": list(chosen), "heads": [list(h) for h in chosen.values()]},
        "measured": [
            {
                "layer": layer,
                "distance": [round(float(d), 4) for d in distance[i]],
                "sink_mass": [round(float(s), 6) for s in sink_mass[i]],
            }
            for i, layer in enumerate(layers)
        ],
    }
    write_json_atomic(run.path / FILE, content)
    return content


def frozen_choice(run: RunFiles) -> dict[str, Any] | None:
    """The `layers` and `heads` of `CaptureConfig` that were chosen for this run, None without the
    file. PivotTraceError if it was made from another pool or model, or was broken since."""
    path = run.path / FILE
    if not path.exists():
        return None
    content = read_object(path)
    made, now = content.get("made_from"), _made_from(run)
    if made != now:
        raise PivotTraceError(
            f"The heads in {path} were chosen for {_side(made)}, but the run has {_side(now)}: run "
            "`pivottrace calibrate` again, or remove the file."
        )
    capture = content.get("capture")
    if not isinstance(capture, dict) or set(capture) != {"layers", "heads"}:
        raise PivotTraceError(
            f"{path} holds no layers and heads: run `pivottrace calibrate` again, or remove it."
        )
    checked = CaptureConfig.from_dict(capture)
    return {"layers": checked.layers, "heads": checked.heads}


def captured_by(run: RunFiles) -> CaptureConfig:
    """What this run captures: what its scores were made with, and before those what `score` will
    capture unless it is told otherwise. PivotTraceError as in `frozen_choice`."""
    if not run.finished_parts():
        return CaptureConfig(**(frozen_choice(run) or {}))
    scored = run.manifest.get("settings", {}).get("score")
    capture = scored.get("capture") if isinstance(scored, dict) else None
    if not isinstance(capture, dict):
        raise PivotTraceError(
            f"{run.path / 'manifest.json'} does not say what the scores beside it were captured "
            "with: it was changed, or made by another program."
        )
    return CaptureConfig.from_dict(capture)


def _made_from(run: RunFiles) -> dict[str, str]:
    return {name: run.stage_fingerprint(name) for name in ("pool", "model")}


def _side(made_from: Any) -> str:
    if not isinstance(made_from, dict):
        return "nothing that it names"
    return " and ".join(f"{name} {value}" for name, value in sorted(made_from.items()))
