"""Curriculum: which prompt comes next.

Contract: an endless iterator of data set indices; every prompt at least once a pass, and exactly
once where the batches' shares are not bounded. Prompts at rest (those that re-triage took out) come
once in `revisit` passes, so none is skipped for ever. What comes follows from the settings, the
seed and the state alone, so a resumed run draws the same prompts as one that was not interrupted.
The state is a few numbers until re-triage moves prompts or a bounded share repeats some, and then
a few numbers a prompt.

    curriculum = Curriculum(items, CurriculumConfig(batch_size=32, order="mixed"))
    curriculum.begin(step); batch = [next(curriculum) for _ in range(32)]
    curriculum.observe(records); state = curriculum.state_dict()

A pass is laid out once, when it begins or when `update` changes it; a draw costs the same however
large the pool. A batch is `batch_size` draws in a row: where verl replaces groups that
`filter_groups` took out, the replacements are draws, too. A prompt comes twice in a batch only once
all others of its route that are not at rest are in it.

Axes: P prompts; R = 2 routes.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pivottrace_verl.curriculum_config import ORDERS, CurriculumConfig
from pivottrace_verl.curriculum_items import ROUTES, Item, Items, Places, items_of
from pivottrace_verl.curriculum_queue import Counts, Queue, least_drawn, not_in_batch_first
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
        self._since: NDArray[np.int32] | None = None
        """[P] step from which a prompt has its route and rest; None: none ever moved."""
        self._step = 1
        self._pass = 0
        self._counts: Counts | None = None
        """[P] how often a prompt came in this pass, the draws from the present queues apart; None:
        never."""
        self._wanted = 0.0
        """Draws that annotate should have had since the layout, where its share is scheduled."""
        self._drawn = [0, 0]
        self._batch: list[int] = []
        """Places of the prompts in the batch that is being drawn."""
        self._in_batch = 0
        """Of these, drawn on route annotate."""
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

    def _lay_out(self, batch: Sequence[int] = ()) -> None:
        """Queue what has not come in the pass, by route; the prompts of `batch` come last."""
        turn = np.arange(len(self._u)) % self._config.revisit == self._pass % self._config.revisit
        left = ~self._resting | turn
        if self._counts is not None:
            left &= self._counts == 0
        order = self._order()
        order = not_in_batch_first(order[left[order]], batch, len(self._u))
        route = self._route[order]
        # Where a prompt stands in the whole order, to merge the two queues again.
        self._rank = [np.flatnonzero(route == r) for r in range(len(ROUTES))]
        self._queues = [Queue(order[rank]) for rank in self._rank]
        self._share = len(self._rank[ANNOTATE]) / max(1, len(order))
        self._laid_out_in = list(batch)
        self._wanted = 0.0
        self._members: list[NDArray[np.intp] | None] = [None, None]

    def _awake(self, route: int) -> NDArray[np.intp]:
        """[N] the route's prompts that are not at rest, in the order of this pass."""
        found = self._members[route]
        if found is None:
            order = self._order()
            found = order[((self._route == route) & ~self._resting)[order]]
            self._members[route] = found
        return found

    def _begin_again(self, route: int) -> None:
        """Queue the prompts of a route whose queue is used up once more: those that came least."""
        counts = self._counted()
        self._queues[route].count(counts)
        self._queues[route] = Queue(
            least_drawn(self._awake(route), counts, self._batch), again=True
        )

    def _counted(self) -> Counts:
        if self._counts is None:
            self._counts = np.zeros(len(self._u), dtype=np.int32)
        return self._counts

    def update(
        self,
        *,
        annotate: NDArray[np.bool_],
        resting: NDArray[np.bool_],
        uncertainty: NDArray[np.float64],
    ) -> None:
        """Move the prompts [P] after a step, in the order of their rows in the data set: their
        routes, whether they rest, their uncertainty (finite). What is left of the pass is laid out
        anew; what was drawn in it comes again only where a bounded share asks for it."""
        route = np.where(annotate, ANNOTATE, SELF_TRAIN).astype(np.int8)
        moved = (route != self._route) | (resting != self._resting)
        self._route = route
        self._resting = resting.copy()
        self._u = uncertainty.copy()
        self._by_uncertainty = None
        self._changed(np.flatnonzero(moved), self._step + 1)

    def labelled(self, pt_ids: Sequence[str]) -> None:
        """The labels of these prompts are there, from the step that begins: they are on route
        annotate and at rest no more."""
        places = self._places.of(pt_ids)
        self._route[places] = ANNOTATE
        self._resting[places] = False
        self._changed(places, self._step)

    def _changed(self, places: NDArray[np.intp], step: int) -> None:
        if self._since is None:
            self._since = np.zeros(len(self._u), dtype=np.int32)
        self._since[places] = step
        for queue in self._queues:
            queue.count(self._counted())
        self._lay_out(self._batch)

    # Drawing

    def begin(self, step: int) -> None:
        """The training step, counted from 1, that the next draws are for."""
        self._step = step

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        while not any(queue.is_first for queue in self._queues):
            self._pass += 1
            self._counts = None
            self._lay_out(self._batch)
        route = self._next_route()
        if not self._queues[route].left:
            self._begin_again(route)
        queue = self._queues[route]
        place = queue.draw()
        self._repeated += queue.again
        if self._config.share_steps:
            self._wanted += self._scheduled_share()
        self._drawn[route] += 1
        self._batch.append(place)
        self._in_batch += route == ANNOTATE
        if len(self._batch) == self._config.batch_size:
            self._batch, self._in_batch = [], 0
        return int(self._items.index[place])

    def _next_route(self) -> int:
        """The route asked for, or the other if all its prompts are at rest."""
        route = self._wanted_route()
        there = self._queues[route].left or len(self._awake(route)) > 0
        return route if there else 1 - route

    def _wanted_route(self) -> int:
        fewest, most = self._config.annotate_bounds()
        slots = self._config.batch_size - len(self._batch)
        if fewest - self._in_batch >= slots:
            return ANNOTATE
        if self._in_batch >= most:
            return SELF_TRAIN
        for route, queue in enumerate(self._queues):
            if not queue.is_first:
                return 1 - route
        if self._config.order == "mixed":
            return self._behind()
        heads = [rank[queue.taken] for rank, queue in zip(self._rank, self._queues, strict=True)]
        return ANNOTATE if heads[ANNOTATE] < heads[SELF_TRAIN] else SELF_TRAIN

    def _behind(self) -> int:
        """The route further behind its share, so that each stays within one prompt of it."""
        taken = [queue.taken for queue in self._queues]
        n = sum(taken) + 1
        if self._config.share_steps:
            wanted = self._wanted + self._scheduled_share()
            targets = (wanted, n - wanted)
        else:
            share = self._scheduled_share()
            targets = (share * n, (1.0 - share) * n)
        behind = [target - drawn for target, drawn in zip(targets, taken, strict=True)]
        return ANNOTATE if behind[ANNOTATE] >= behind[SELF_TRAIN] else SELF_TRAIN

    def _scheduled_share(self) -> float:
        """The share of annotate prompts at this step."""
        share = self._config.share_at(self._step)
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

    def since(self, pt_ids: Sequence[str]) -> NDArray[np.int32]:
        """[N] ids -> [N] the first step that each has its present route, label and rest at; 0: it
        has them from the start."""
        if self._since is None:
            return np.zeros(len(pt_ids), dtype=np.int32)
        return np.asarray(self._since[self._places.of(pt_ids)])

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
        """JSON-able until `update` was called or a route began again in this pass, and then with a
        few numbers a prompt; names the items and settings it belongs to by their fingerprint."""
        moved = None
        if self._since is not None:
            moved = {
                "route": self._route.copy(),
                "resting": np.packbits(self._resting),
                "uncertainty": self._u.copy(),
                "since": self._since.copy(),
            }
        counts = self._counts
        return {
            "format": 3,
            "fingerprint": self._fingerprint,
            "step": self._step,
            "pass": self._pass,
            "laid_out_in": list(self._laid_out_in),
            "counts": None if counts is None else counts.astype(np.min_scalar_type(counts.max())),
            "taken": [queue.taken for queue in self._queues],
            "again": [queue.prompts.copy() if queue.again else None for queue in self._queues],
            "wanted": self._wanted,
            "drawn": list(self._drawn),
            "batch": list(self._batch),
            "in_batch": int(self._in_batch),
            "repeated": int(self._repeated),
            "moved": moved,
            "observed": self._observed,
            "last": dict(self._last),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken. Raises PivotTraceError, naming both fingerprints, if
        it belongs to other prompts, routes or settings; the curriculum is then unchanged."""
        if state.get("format") != 3:
            raise PivotTraceError(
                f"The curriculum's state has format {state.get('format')}, but this version reads "
                "format 3."
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
        self._step, self._pass = int(state["step"]), int(state["pass"])
        moved, count = state["moved"], len(self._u)
        self._route, self._u = self._items.route.copy(), self._items.uncertainty.copy()
        self._resting, self._since = np.zeros(count, dtype=bool), None
        if moved is not None:
            self._route = np.array(moved["route"], dtype=np.int8)
            self._u = np.array(moved["uncertainty"], dtype=np.float64)
            self._resting = np.unpackbits(moved["resting"], count=count).astype(bool)
            self._since = np.array(moved["since"], dtype=np.int32)
        counts = state["counts"]
        self._counts = None if counts is None else np.array(counts, dtype=np.int32)
        self._by_uncertainty = None
        self._lay_out([int(place) for place in state["laid_out_in"]])
        for route, (again, taken) in enumerate(zip(state["again"], state["taken"], strict=True)):
            if again is not None:
                self._queues[route] = Queue(np.array(again, dtype=np.intp), again=True)
            self._queues[route].taken = int(taken)
        self._wanted = float(state["wanted"])
        self._drawn = [int(n) for n in state["drawn"]]
        self._batch = [int(place) for place in state["batch"]]
        self._in_batch, self._repeated = int(state["in_batch"]), int(state["repeated"])
        self._observed = int(state["observed"])
        self._last = {name: float(value) for name, value in state["last"].items()}
