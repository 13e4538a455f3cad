"""The prompts of a curriculum, by column, and where a prompt stands in them.

Contract: columns of NumPy, so that a pool of millions is a few arrays; rows are sorted by the data
set's index. Every prompt is there once.

Axes: P prompts.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pivottrace_verl.curriculum_config import CurriculumConfig
from pivottrace_verl.errors import PivotTraceError

ROUTES = ("annotate", "self_train")
Index = NDArray[np.int64]


@dataclass(frozen=True)
class Item:
    """A prompt that is trained on."""

    index: int
    """Its row in the data set; what the curriculum yields."""
    pt_id: str
    route: str
    """`annotate` or `self_train`: a dropped prompt has no place in a curriculum."""
    uncertainty: float
    """Rank in [0, 1]."""


@dataclass(frozen=True)
class Items:
    """[P] each, sorted by index."""

    index: Index
    pt_id: NDArray[np.str_]
    route: NDArray[np.int8]
    """Place in ROUTES."""
    uncertainty: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        index: Sequence[int] | Index,
        pt_id: Sequence[str],
        route: Sequence[str],
        uncertainty: Sequence[float] | NDArray[np.float64],
    ) -> "Items":
        """Columns in any order. PivotTraceError if a prompt is there twice, has another route
        than ROUTES, or no finite uncertainty; also if there is none."""
        if not len(index):
            raise PivotTraceError("The curriculum has no prompts: every prompt was dropped.")
        by_index = np.argsort(np.asarray(index, dtype=np.int64), kind="stable")
        names = np.asarray(route)[by_index]
        items = cls(
            np.asarray(index, dtype=np.int64)[by_index],
            np.asarray(pt_id)[by_index],
            np.where(names == ROUTES[0], 0, 1).astype(np.int8),
            np.asarray(uncertainty, dtype=np.float64)[by_index],
        )
        _check_once("index", items.index)
        strange = np.flatnonzero(~np.isin(names, ROUTES))
        if len(strange):
            raise PivotTraceError(
                f"Prompt {items.pt_id[strange[0]]} has route '{names[strange[0]]}', but the "
                "curriculum takes only annotate and self_train."
            )
        unknown = np.flatnonzero(~np.isfinite(items.uncertainty))
        if len(unknown):
            raise PivotTraceError(f"Prompt {items.pt_id[unknown[0]]} has no finite uncertainty.")
        return items

    def fingerprint(self, config: CurriculumConfig) -> str:
        """Of the prompts, their routes and uncertainties, and the settings."""
        digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
        for column in (self.index, self.route, self.uncertainty):
            digest.update(np.ascontiguousarray(column).tobytes())
        digest.update("\n".join(self.pt_id.tolist()).encode())
        return digest.hexdigest()[:16]


def items_of(items: Items | Sequence[Item]) -> Items:
    """Rows or columns as columns."""
    if isinstance(items, Items):
        return items
    return Items.of(
        [item.index for item in items],
        [item.pt_id for item in items],
        [item.route for item in items],
        [item.uncertainty for item in items],
    )


def _check_once(what: str, ascending: NDArray[Any]) -> None:
    twice = np.flatnonzero(ascending[1:] == ascending[:-1])
    if len(twice):
        value = ascending[twice[0]]
        raise PivotTraceError(
            f"The curriculum got the {what} {value} {int((ascending == value).sum())} times: every "
            "prompt must be there once."
        )


class Places:
    """Where prompts stand, found by their id."""

    def __init__(self, items: Items) -> None:
        self.by_id: NDArray[np.intp] = np.argsort(items.pt_id, kind="stable")
        """[P] the places in the order of the ids."""
        self._ids = items.pt_id[self.by_id]
        _check_once("pt_id", self._ids)

    def of(self, pt_ids: Sequence[str]) -> NDArray[np.intp]:
        """[N] ids -> [N] places. PivotTraceError, naming the first, if some are not there."""
        if not len(pt_ids):
            return np.empty(0, dtype=np.intp)
        asked = np.asarray(pt_ids)
        at = np.minimum(np.searchsorted(self._ids, asked), len(self._ids) - 1)
        unknown = np.flatnonzero(self._ids[at] != asked)
        if len(unknown):
            raise PivotTraceError(
                f"{len(unknown)} prompts are not in the curriculum (first: {asked[unknown[0]]})."
            )
        return np.asarray(self.by_id[at], dtype=np.intp)
