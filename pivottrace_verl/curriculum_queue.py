"""The queue of one route in a pass: prompts as places in the data set, in the order they come.

Contract: pure, no state but the queue's own. A route's first queue of a pass holds what has not
come in it; a later one holds the prompts that came least, so that repeats are spread evenly.

Axes: P prompts of training, N of a route, Q of a queue.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int32]


@dataclass
class Queue:
    """Prompts [Q], each once, and how many of them were drawn."""

    prompts: NDArray[np.intp]
    taken: int = 0
    again: bool = False
    """Whether all of them came before in this pass."""

    @property
    def left(self) -> bool:
        """Whether a prompt is left."""
        return self.taken < len(self.prompts)

    @property
    def is_first(self) -> bool:
        """Whether a prompt is left that has not come in this pass."""
        return self.left and not self.again

    def draw(self) -> int:
        """The next prompt."""
        place = int(self.prompts[self.taken])
        self.taken += 1
        return place

    def count(self, counts: Counts) -> None:
        """Add what was drawn to `counts` [P]."""
        counts[self.prompts[: self.taken]] += 1


def not_in_batch_first(
    order: NDArray[np.intp], batch: Sequence[int], n_prompts: int
) -> NDArray[np.intp]:
    """[Q] -> [Q] the same order, but for the prompts of the batch, which go to its end."""
    if not batch:
        return order
    there = np.zeros(n_prompts, dtype=bool)
    there[batch] = True
    behind = there[order]
    return np.concatenate([order[~behind], order[behind]])


def least_drawn(
    members: NDArray[np.intp], counts: Counts, batch: Sequence[int]
) -> NDArray[np.intp]:
    """[N] -> [Q] of the members that are not in the batch (of all, if all are) those with the
    smallest count, in their order."""
    outside = members[~np.isin(members, batch)]
    if not len(outside):
        outside = members
    came = counts[outside]
    least: NDArray[np.intp] = outside[came == came.min()]
    return least
