"""The curriculum as a torch sampler: infinite, stateful, in place of verl's own.

torchdata saves and restores a sampler that has `state_dict`/`load_state_dict`, so all that steers
the training travels in verl's checkpoint (`data.pt`). It must be read one prompt at a time and
never ahead: `data.dataloader_num_workers` has to be 0.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from torch.utils.data import Sampler

from pivottrace_verl.training.steering import Steering


class CurriculumSampler(Sampler[int]):
    """Yields data set indices for ever, in the curriculum's order."""

    def __init__(self, steering: Steering, length: int) -> None:
        self._steering = steering
        self._length = length

    def __iter__(self) -> Iterator[int]:
        while True:
            start = time.perf_counter()
            index = next(self._steering.curriculum)
            self._steering.seconds += time.perf_counter() - start
            yield index

    def __len__(self) -> int:
        return self._length

    def state_dict(self) -> dict[str, Any]:
        return self._steering.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steering.load_state_dict(state)
