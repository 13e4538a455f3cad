"""Curriculum: which prompt comes next.

Contract: an endless iterator of data set indices; every prompt at least once a pass, and exactly
once where the batches' shares are not bounded. Prompts at rest (those that re-triage took out) come
once in `revisit` passes, so none is skipped for ever. What comes follows from the settings, the
seed and the state alone, so a resumed run draws the same prompts as one that was not interrupted.
The state is a few numbers until re-triage moves prompts, and then three arrays more.

    curriculum = Curriculum(items, CurriculumConfig(batch_size=32, order="mixed"))
    batch = [next(curriculum) for _ in range(32)]
    curriculum.observe(records); state = curriculum.state_dict()

A pass is laid out once, when it begins or when `update` changes it; a draw costs the same however
large the pool. A batch is `batch_size` draws in a row: where verl replaces groups that
`filter_groups` took out, the replacements are draws, too.

Axes: P prompts; R = 2 routes.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pivottrace_verl.curriculum_config import ORDERS, CurriculumConfig
from pivottrace_verl.curriculum_items import ROUTES, Item, Items, Places, items_of
from pivottrace_verl.errors import PivotTraceError

__all__ = ["ORDERS", "ROUTES", "Curriculum", "CurriculumConfig", "Item", "Items"]

ANNOTATE, SELF_TRAIN = 0, 1


class Curriculum:
    """Draws prompts; `CurriculumConfig` says in which order."""

    def __init__(self, items: Items | Sequence[Item], config: CurriculumConfig) -> None:
        self._items = items_of(items)
        self._config = config
        self._places = Places(self._items)
        self._fingerprint = self._items.fingerprint(config)
        self._route = self._items.route.copy()
        self._u = self._items.uncertainty.copy()
        self._resting = np.zeros(len(self._u), dtype=bool)
        self._updates = 0
        self._pass = 0
        self._done: NDArray[np.bool_] | None = None
        """[P] drawn in this pass before the latest update; None: there was none in this pass."""
        self._taken = [0, 0]
        """[R] drawn since the layout."""
        self._wanted = 0.0
        """Draws that annotate should have had since the layout, where its share is scheduled."""
        self._drawn = [0, 0]
        self._in_batch = 0
        """Annotate prompts in the batch that is being drawn."""
        self._repeated = 0
        self._observed = 0
        self._last: dict[str, float] = {}
        self._by_uncertainty: NDArray[np.intp] | None = None
        self._lay_out()

    # Layout

    def _order(self) -> NDArray[np.intp]:
        """[P] all prompts in the order of this pass."""
        order = self._config.order
        if order in ("easy_to_hard", "uncertainty_first"):
            if self._by_uncertainty is None:
                sign = 1.0 if order == "easy_to_hard" else -1.0
                by_id = self._places.by_id
                self._by_uncertainty = by_id[np.argsort((sign * self._u)[by_id], kind="stable")]
            return self._by_uncertainty
        rng = np.random.Generator(np.random.PCG64([self._config.seed % 2**63, self._pass]))
        return rng.permutation(len(self._u))

    def _lay_out(self) -> None:
        """Queue what is left of the pass, by route."""
        turn = np.arange(len(self._u)) % self._config.revisit == self._pass % self._config.revisit
        left = ~self._resting | turn
        if self._done is not None:
            left &= ~self._done
        order = self._order()
        order = order[left[order]]
        route = self._route[order]
        # Where a prompt stands in the whole order, to merge the two queues again.
        self._rank = [np.flatnonzero(route == r) for r in range(len(ROUTES))]
        self._queue = [order[rank] for rank in self._rank]
        self._share = len(self._queue[ANNOTATE]) / max(1, len(order))
        self._taken, self._wanted = [0, 0], 0.0

    def update(
        self,
        *,
        annotate: NDArray[np.bool_],
        resting: NDArray[np.bool_],
        uncertainty: NDArray[np.float64],
    ) -> None:
        """Move the prompts [P], in the order of their rows in the data set: their routes, whether
        they rest, their uncertainty (finite). What is left of the pass is laid out anew; nothing
        that was drawn in it comes again."""
        self._route = np.where(annotate, ANNOTATE, SELF_TRAIN).astype(np.int8)
        self._resting = resting.copy()
        self._u = uncertainty.copy()
        self._changed()

    def labelled(self, pt_ids: Sequence[str]) -> None:
        """The labels of these prompts are there: they are on route annotate and at rest no more."""
        places = self._places.of(pt_ids)
        self._route[places] = ANNOTATE
        self._resting[places] = False
        self._changed()

    def _changed(self) -> None:
        done = np.zeros(len(self._u), dtype=bool) if self._done is None else self._done
        for queue, taken in zip(self._queue, self._taken, strict=True):
            done[queue[:taken]] = True
        self._done = done
        self._updates += 1
        self._by_uncertainty = None
        self._lay_out()

    # Drawing

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        while all(self._exhausted(r) for r in range(len(ROUTES))):
            self._pass += 1
            self._done = None
            self._lay_out()
        route = self._next_route()
        queue, taken = self._queue[route], self._taken[route]
        self._repeated += taken >= len(queue)
        place = queue[taken % len(queue)]
        self._wanted += self._scheduled_share()
        self._taken[route] += 1
        self._drawn[route] += 1
        self._in_batch += route == ANNOTATE
        if self._place_in_batch() == 0:
            self._in_batch = 0
        return int(self._items.index[place])

    def _exhausted(self, route: int) -> bool:
        return self._taken[route] >= len(self._queue[route])

    def _place_in_batch(self) -> int:
        return sum(self._drawn) % self._config.batch_size

    def _next_route(self) -> int:
        empty = [len(queue) == 0 for queue in self._queue]
        if any(empty):
            return empty.index(False)
        fewest, most = self._config.annotate_bounds()
        slots = self._config.batch_size - self._place_in_batch()
        if fewest - self._in_batch >= slots:
            return ANNOTATE
        if self._in_batch >= most:
            return SELF_TRAIN
        for route in range(len(ROUTES)):
            if self._exhausted(route):
                return 1 - route
        if self._config.order == "mixed":
            return self._behind()
        heads = [rank[taken] for rank, taken in zip(self._rank, self._taken, strict=True)]
        return ANNOTATE if heads[ANNOTATE] < heads[SELF_TRAIN] else SELF_TRAIN

    def _behind(self) -> int:
        """The route further behind its share, so that each stays within one prompt of it."""
        n = sum(self._taken) + 1
        if self._config.share_steps:
            wanted = self._wanted + self._scheduled_share()
            targets = (wanted, n - wanted)
        else:
            share = self._scheduled_share()
            targets = (share * n, (1.0 - share) * n)
        behind = [target - taken for target, taken in zip(targets, self._taken, strict=True)]
        return ANNOTATE if behind[ANNOTATE] >= behind[SELF_TRAIN] else SELF_TRAIN

    def _scheduled_share(self) -> float:
        """The share of annotate prompts at this draw."""
        step = sum(self._drawn) // self._config.batch_size
        share = self._config.share_at(step)
        return self._share if share is None else share

    # What the trainer tells and asks

    def observe(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take in one training step: a record a rollout, with `pt_id`, `route`, `reward` and,
        where the group has one, `agreement`. Kept as the means of the latest step, by route.

        Raises PivotTraceError for a prompt the curriculum never gave out.
        """
        rows = list(records)
        self._places.of(list(dict.fromkeys(row["pt_id"] for row in rows)))
        self._observed += len(rows)
        self._last = {}
        for name in ("reward", "agreement"):
            for route in ROUTES:
                values = [
                    float(row[name])
                    for row in rows
                    if row["route"] == route and row.get(name) is not None
                ]
                if values:
                    self._last[f"{route}/{name}"] = sum(values) / len(values)

    def route_of(self, pt_id: str) -> str:
        """The prompt's present route; at rest it has one, too."""
        return ROUTES[self._route[self._places.of([pt_id])[0]]]

    def uncertainty_of(self, pt_ids: Sequence[str]) -> NDArray[np.float64]:
        """[N] ids -> [N] present uncertainties."""
        return np.asarray(self._u[self._places.of(pt_ids)], dtype=np.float64)

    def rows_of(self, pt_ids: Sequence[str]) -> list[int]:
        """[N] ids -> [N] rows of the data set."""
        rows: list[int] = self._items.index[self._places.of(pt_ids)].tolist()
        return rows

    def reach(self) -> float:
        """The largest uncertainty of a self_train prompt that is not at rest; infinity if there is
        none, or no annotate prompt that is at most as uncertain."""
        awake = ~self._resting
        voted = self._u[(self._route == SELF_TRAIN) & awake]
        known = self._u[(self._route == ANNOTATE) & awake]
        if not len(voted) or not (known <= voted.max()).any():
            return math.inf
        return float(voted.max())

    def metrics(self) -> dict[str, float]:
        """Flat floats under `curriculum/`: passes, prompts drawn by route, prompts at rest, draws
        that a bounded share asked for a second time in a pass, the latest step."""
        drawn = sum(self._drawn)
        return {
            "curriculum/passes": drawn / len(self._u),
            "curriculum/batches": drawn / self._config.batch_size,
            **{
                f"curriculum/drawn/{route}": float(n)
                for route, n in zip(ROUTES, self._drawn, strict=True)
            },
            "curriculum/repeated": float(self._repeated),
            "curriculum/resting": float(self._resting.sum()),
            "curriculum/observed": float(self._observed),
            **{f"curriculum/{name}": value for name, value in self._last.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """JSON-able, with a few bits and numbers a prompt only once `update` was called; names the
        items and settings it belongs to by their fingerprint."""
        moved = None
        if self._updates:
            moved = {
                "route": self._route.copy(),
                "resting": np.packbits(self._resting),
                "uncertainty": self._u.copy(),
                "done": None if self._done is None else np.packbits(self._done),
            }
        return {
            "format": 2,
            "fingerprint": self._fingerprint,
            "pass": self._pass,
            "taken": list(self._taken),
            "wanted": self._wanted,
            "drawn": list(self._drawn),
            "in_batch": int(self._in_batch),
            "repeated": int(self._repeated),
            "updates": self._updates,
            "moved": moved,
            "observed": self._observed,
            "last": dict(self._last),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken. Raises PivotTraceError, naming both fingerprints, if
        it belongs to other prompts, routes or settings; the curriculum is then unchanged."""
        if state.get("format") != 2:
            raise PivotTraceError(
                f"The curriculum's state has format {state.get('format')}, but this version reads "
                "format 2."
            )
        if state["fingerprint"] != self._fingerprint:
            raise PivotTraceError(
                f"The saved curriculum {state['fingerprint']} belongs to other prompts, routes or "
                f"settings than this one, {self._fingerprint}."
            )
        if min(*state["taken"], *state["drawn"], state["pass"]) < 0:
            raise PivotTraceError(
                f"The saved curriculum has drawn {state['taken']} prompts in pass {state['pass']}, "
                "which no curriculum has."
            )
        self._pass = int(state["pass"])
        self._updates = int(state["updates"])
        moved, count = state["moved"], len(self._u)
        self._route, self._u = self._items.route.copy(), self._items.uncertainty.copy()
        self._resting, self._done = np.zeros(count, dtype=bool), None
        if moved is not None:
            self._route = np.array(moved["route"], dtype=np.int8)
            self._u = np.array(moved["uncertainty"], dtype=np.float64)
            self._resting = np.unpackbits(moved["resting"], count=count).astype(bool)
            if moved["done"] is not None:
                self._done = np.unpackbits(moved["done"], count=count).astype(bool)
        self._by_uncertainty = None
        self._lay_out()
        self._taken = [int(n) for n in state["taken"]]
        self._wanted = float(state["wanted"])
        self._drawn = [int(n) for n in state["drawn"]]
        self._in_batch, self._repeated = int(state["in_batch"]), int(state["repeated"])
        self._observed = int(state["observed"])
        self._last = {name: float(value) for name, value in state["last"].items()}
