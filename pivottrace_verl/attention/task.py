"""What one worker of an engine is to capture: its layers, its heads, its place among the workers.

`vllm_hooks.attach` makes it; both ways of capturing (`cpu_capture`, `device_capture`) work from it.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.attention.parts import Groups, Part, Place, own_heads
from pivottrace_verl.attention.support import TracedLayer
from pivottrace_verl.pivots import FEATURES


@dataclass(frozen=True)
class Task:
    """One worker's share of the capture."""

    runner: Any
    """vLLM's model runner."""
    kv_cache_config: Any
    config: CaptureConfig
    traced: list[TracedLayer]
    """All traced layers of the engine, also those of other workers."""
    groups: list[Groups]
    """Head groups of each traced layer, in the numbers of the whole layer."""
    place: Place
    part: Part
    witness: TracedLayer | None = None
    """A layer whose steps are followed where this worker has the logits and no traced layer."""

    @cached_property
    def layers(self) -> list[TracedLayer]:
        """This worker's traced layers."""
        return [self.traced[number] for number in self.part.layers]

    @cached_property
    def own_groups(self) -> list[Groups]:
        """Head groups of each of `layers`, in the numbers of the heads this worker has; a group
        that is wholly elsewhere is empty."""
        return [
            own_heads(self.groups[number], layer.n_heads, self.place.tensor_rank)
            for number, layer in zip(self.part.layers, self.layers, strict=True)
        ]

    @property
    def n_groups(self) -> int:
        return len(self.groups[0])

    @property
    def followed(self) -> TracedLayer:
        """A layer of this worker that runs in every step.

        Raises ValueError for a worker without a traced layer and without a witness.
        """
        if self.layers:
            return self.layers[0]
        if self.witness is None:
            raise ValueError("A worker without a traced layer needs a witness.")
        return self.witness

    @property
    def cache_group(self) -> int:
        """The KV cache group of the traced layers."""
        return self.traced[0].group

    @property
    def block_size(self) -> int:
        """Tokens of one of the scheduler's blocks."""
        group = self.kv_cache_config.kv_cache_groups[self.cache_group]
        return int(group.kv_cache_spec.block_size)

    @property
    def n_slots(self) -> int:
        return int(self.kv_cache_config.num_blocks) * self.block_size

    def describe(self, isa: str, key_layout: str | None) -> dict[str, Any]:
        """What the worker says of itself in its hello: see `channel.Receiver.engine`."""
        chosen = self.config.heads
        return {
            "backend": self.followed.backend,
            "isa": isa,
            "key_layout": key_layout,
            "layers": [layer.index for layer in self.traced],
            "head_groups": None if chosen else [list(group) for group in self.groups[0]],
            "heads": chosen and [list(heads) for heads in chosen],
            "features": list(FEATURES),
            "dtype": str(self.followed.module.kv_cache.dtype).removeprefix("torch."),
            "block_size": self.block_size,
            "slots": self.n_slots,
            "tensor_parallel": self.place.tensor_size,
            "pipeline_parallel": self.place.n_stages,
        }
