"""What to capture: layers, head groups, the window and the sink; and how it is asked for.

The owner of an engine sets the three environment variables below before the engine starts
(`channel.Receiver.start` does); its worker processes inherit them. A single request opts in by
`SamplingParams.extra_args = {"pivottrace": {"key": "<unique string>"}}`; one that goes on with a
rollout, its prompt being prompt and tokens so far, adds the length of the first prompt as
`"prompt_tokens"`, so that prompt and response are told apart as if it had been one request
(`channel.Trace.join` puts the traces together). With n > 1 the first of a request's outputs goes by
its key and the i-th other one by `key/i`.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pivottrace_verl.errors import PivotTraceError

ENV_CAPTURE = "PIVOTTRACE_CAPTURE"
"""JSON of `CaptureConfig`; its absence means: change nothing."""
ENV_ENDPOINT = "PIVOTTRACE_ENDPOINT"
"""ZeroMQ address of the receiver, on this machine."""
ENV_TOKEN = "PIVOTTRACE_TOKEN"
"""Random token of one engine; messages without it are rejected."""
ENV_DISABLE = "PIVOTTRACE_DISABLE"
"""The kill switch: `1` makes every entry point return at once."""

WITHOUT_CAPTURE = (
    "without capture go `pivottrace score --capture replay` (or off) and training with "
    "pivottrace.capture.enable=false"
)
"""What helps where an engine cannot capture; ends a sentence."""

EXTRA_ARGS_NAME = "pivottrace"
"""The name under which a request opts in, in `SamplingParams.extra_args`."""

TOKEN_STATISTICS = ("token_entropy", "self_certainty")
"""What is kept of the full next-token distribution that chose each token; see
`reference.token_statistics`."""

WIRE_DTYPES = {"float32": "<f4", "float16": "<f2"}


@dataclass(frozen=True)
class CaptureConfig:
    """Which statistics are captured. `CaptureConfig()` traces two layers, all heads averaged."""

    layers: tuple[int, ...] | None = None
    """Layers by index; None: two layers, evenly in the middle third of the model."""
    head_groups: tuple[tuple[int, ...], ...] | None = None
    """Query heads whose statistics are averaged, per group; None: one group of all heads."""
    heads: tuple[tuple[int, ...], ...] | None = None
    """Of each of `layers` the query heads whose statistics are averaged, in place of `head_groups`:
    what `pivottrace calibrate` chooses."""
    window: int = 32
    """W in tokens: keys at least W back are long-range, distances are clipped at W."""
    sink: int = 4
    """S: the first S keys are the attention sink, taken out of the distance statistics."""
    wire: str = "float32"
    """Number format of a trace between the engine and its owner: float32 or float16."""

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", _integers("layers", self.layers))
        if self.head_groups is not None:
            if isinstance(self.head_groups, str) or not isinstance(self.head_groups, Sequence):
                raise PivotTraceError(
                    f"capture.head_groups must be a list of lists of head numbers, "
                    f"not {self.head_groups!r}."
                )
            groups = tuple(_integers("head_groups", group) for group in self.head_groups)
            if not groups:
                raise PivotTraceError("capture.head_groups must name at least one group of heads.")
            object.__setattr__(self, "head_groups", groups)
        if self.heads is not None:
            if isinstance(self.heads, str) or not isinstance(self.heads, Sequence):
                raise PivotTraceError(
                    f"capture.heads must be a list of lists of head numbers, not {self.heads!r}."
                )
            heads = tuple(_integers("heads", layer) for layer in self.heads)
            object.__setattr__(self, "heads", heads)
            if self.layers is None or len(self.layers) != len(heads):
                raise PivotTraceError(
                    f"capture.heads names heads of {len(heads)} layers, but capture.layers names "
                    f"{0 if self.layers is None else len(self.layers)}."
                )
            if self.head_groups is not None:
                raise PivotTraceError(
                    "capture.heads and capture.head_groups exclude each other: leave one out."
                )
        if not isinstance(self.window, int) or not 1 <= self.window <= 1024:
            raise PivotTraceError(f"capture.window must be in 1 to 1024 tokens, not {self.window}.")
        if not isinstance(self.sink, int) or self.sink < 0:
            raise PivotTraceError(f"capture.sink must be 0 or more tokens, not {self.sink}.")
        if self.wire not in WIRE_DTYPES:
            raise PivotTraceError(
                f"capture.wire must be one of {', '.join(WIRE_DTYPES)}, not {self.wire!r}."
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields; `heads` only where they were chosen, so that settings kept before that was
        possible are still the same settings."""
        values = dataclasses.asdict(self)
        if self.heads is None:
            del values["heads"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CaptureConfig":
        """Raises PivotTraceError for an unknown name or a bad value."""
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise PivotTraceError(
                f"Unknown capture setting {', '.join(unknown)}; known are {', '.join(known)}."
            )
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "CaptureConfig":
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise PivotTraceError(f"{ENV_CAPTURE} is not JSON: {error}.") from error
        if not isinstance(values, dict):
            raise PivotTraceError(f"{ENV_CAPTURE} must be a JSON object, not {text!r}.")
        return cls.from_dict(values)

    def choose_layers(self, available: Sequence[int]) -> tuple[int, ...]:
        """The traced layers among those `available` (sorted indices of full attention layers)."""
        if self.layers is None:
            n = len(available)
            if n == 0:
                raise PivotTraceError("The model has no full attention layer that can be traced.")
            # A quarter and three quarters of the way through the middle third.
            chosen = {available[int(n / 3 + n / 3 * share)] for share in (0.25, 0.75)}
            return tuple(sorted(chosen))
        missing = sorted(set(self.layers) - set(available))
        if missing:
            raise PivotTraceError(
                f"capture.layers asks for layer {', '.join(map(str, missing))}, but the full "
                f"attention layers of this model are {', '.join(map(str, available))}."
            )
        return self.layers

    def choose_heads(self, n_heads: int, position: int = 0) -> tuple[tuple[int, ...], ...]:
        """The head groups of a layer with `n_heads` query heads, the one at `position` among the
        traced layers."""
        groups: tuple[tuple[int, ...], ...]
        if self.heads is not None:
            name, groups = "heads", (self.heads[position],)
        elif self.head_groups is not None:
            name, groups = "head_groups", self.head_groups
        else:
            return (tuple(range(n_heads)),)
        bad = sorted({head for group in groups for head in group if head >= n_heads})
        if bad:
            raise PivotTraceError(
                f"capture.{name} asks for head {', '.join(map(str, bad))}, but a layer of "
                f"this model has {n_heads} query heads, 0 to {n_heads - 1}."
            )
        return groups


def _integers(name: str, values: Any) -> tuple[int, ...]:
    """Distinct non-negative integers as a tuple; layers keep the order given."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise PivotTraceError(f"capture.{name} must be a list of numbers, not {values!r}.")
    bad = [v for v in values if isinstance(v, bool) or not isinstance(v, int) or v < 0]
    if bad or not values or len(set(values)) != len(values):
        raise PivotTraceError(
            f"capture.{name} must be distinct whole numbers of 0 or more, not {list(values)!r}."
        )
    return tuple(values)
