"""Curriculum: which prompt comes next.

Contract: an endless iterator of data set indices; every prompt exactly once a pass. The order of
a pass follows from (seed, pass) alone, so the state is two numbers and a fingerprint, and a
resumed run draws the same prompts as one that was not interrupted.

    curriculum = Curriculum(items, batch_size=32, order="mixed", seed=0)
    batch = [next(curriculum) for _ in range(32)]
    curriculum.observe(records); state = curriculum.state_dict()

Axes: P prompts.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pivottrace_verl.errors import PivotTraceError

ORDERS = ("mixed", "easy_to_hard", "uncertainty_first", "random")
ROUTES = ("annotate", "self_train")


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


class Curriculum:
    """Every prompt once a pass; `order` says how a pass is laid out.

    mixed: every stretch of a pass holds the routes in proportion, shuffled within a route.
        `annotate_share` sets another proportion; when a route runs out, the other fills the pass.
    easy_to_hard, uncertainty_first: by uncertainty, ascending or descending, the same every pass.
    random: shuffled anew each pass.
    """

    def __init__(
        self,
        items: Sequence[Item],
        batch_size: int,
        order: str = "mixed",
        seed: int = 0,
        annotate_share: float | None = None,
    ) -> None:
        self._items = sorted(items, key=lambda item: item.index)
        self._config: dict[str, Any] = {
            "batch_size": int(batch_size),
            "order": order,
            "seed": int(seed),
            "annotate_share": None if annotate_share is None else float(annotate_share),
        }
        self._check(annotate_share)
        self._route = {item.pt_id: item.route for item in self._items}
        self._fingerprint = self._make_fingerprint()
        self._pass = 0
        self._position = 0
        self._order = self._lay_out(0)
        self._drawn: Counter[str] = Counter()
        self._observed = 0
        self._last: dict[str, float] = {}

    def _check(self, annotate_share: float | None) -> None:
        if not self._items:
            raise PivotTraceError("The curriculum has no prompts: every prompt was dropped.")
        if self._config["order"] not in ORDERS:
            raise PivotTraceError(
                f"The curriculum's order is '{self._config['order']}', but must be one of "
                f"{', '.join(ORDERS)}."
            )
        if self._config["batch_size"] < 1:
            raise PivotTraceError(
                f"The curriculum's batch size is {self._config['batch_size']}, but must be at "
                "least 1."
            )
        if annotate_share is not None and not 0.0 <= annotate_share <= 1.0:
            raise PivotTraceError(
                f"The curriculum's annotate_share is {annotate_share}, but must lie in [0, 1]."
            )
        for what, values in (
            ("index", [item.index for item in self._items]),
            ("pt_id", [item.pt_id for item in self._items]),
        ):
            value, times = Counter(values).most_common(1)[0]
            if times > 1:
                raise PivotTraceError(
                    f"The curriculum got the {what} {value} {times} times: every prompt must be "
                    "there once."
                )
        for item in self._items:
            if item.route not in ROUTES:
                raise PivotTraceError(
                    f"Prompt {item.pt_id} has route '{item.route}', but the curriculum takes only "
                    "annotate and self_train."
                )
            if not math.isfinite(item.uncertainty):
                raise PivotTraceError(f"Prompt {item.pt_id} has no finite uncertainty.")

    def _make_fingerprint(self) -> str:
        content = [
            self._config,
            [[i.index, i.pt_id, i.route, float(i.uncertainty)] for i in self._items],
        ]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _lay_out(self, number: int) -> list[Item]:
        """The items in the order of pass `number`."""
        order = self._config["order"]
        if order in ("easy_to_hard", "uncertainty_first"):
            sign = 1.0 if order == "easy_to_hard" else -1.0
            return sorted(self._items, key=lambda item: (sign * item.uncertainty, item.pt_id))
        rng = np.random.Generator(np.random.PCG64([self._config["seed"] % 2**63, number]))
        shuffled = [self._items[i] for i in rng.permutation(len(self._items))]
        return shuffled if order == "random" else self._mix(shuffled)

    def _mix(self, shuffled: list[Item]) -> list[Item]:
        """Interleave the routes so that each is always within one prompt of its share."""
        waiting = {route: [i for i in shuffled if i.route == route] for route in ROUTES}
        share = self._config["annotate_share"]
        if share is None:
            share = len(waiting["annotate"]) / len(shuffled)
        target = {"annotate": float(share), "self_train": 1.0 - float(share)}
        taken = dict.fromkeys(ROUTES, 0)
        out: list[Item] = []
        for n in range(1, len(shuffled) + 1):
            route = max(
                (r for r in ROUTES if taken[r] < len(waiting[r])),
                key=lambda r: target[r] * n - taken[r],
            )
            out.append(waiting[route][taken[route]])
            taken[route] += 1
        return out

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if self._position == len(self._order):
            self._pass += 1
            self._position = 0
            self._order = self._lay_out(self._pass)
        item = self._order[self._position]
        self._position += 1
        self._drawn[item.route] += 1
        return item.index

    def observe(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Take in one training step: a record a rollout, with `pt_id`, `reward` and, where the
        group has one, `agreement`. Kept as the means of the latest step, by route.

        Raises PivotTraceError for a prompt the curriculum never gave out.
        """
        rows = list(records)
        unknown = [row["pt_id"] for row in rows if row["pt_id"] not in self._route]
        if unknown:
            raise PivotTraceError(
                f"{len(unknown)} rollouts belong to prompts that are not in the curriculum "
                f"(first: {unknown[0]})."
            )
        self._observed += len(rows)
        self._last = {}
        for name in ("reward", "agreement"):
            for route in ROUTES:
                values = [
                    float(row[name])
                    for row in rows
                    if self._route[row["pt_id"]] == route and row.get(name) is not None
                ]
                if values:
                    self._last[f"{route}/{name}"] = sum(values) / len(values)

    def metrics(self) -> dict[str, float]:
        """Flat floats under `curriculum/`: passes, prompts drawn by route, the latest step."""
        drawn = sum(self._drawn.values())
        return {
            "curriculum/passes": drawn / len(self._items),
            "curriculum/batches": drawn / self._config["batch_size"],
            **{f"curriculum/drawn/{route}": float(self._drawn[route]) for route in ROUTES},
            "curriculum/observed": float(self._observed),
            **{f"curriculum/{name}": value for name, value in self._last.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; names the items and settings it belongs to by their fingerprint."""
        return {
            "format": 1,
            "fingerprint": self._fingerprint,
            "pass": self._pass,
            "position": self._position,
            "drawn": {route: self._drawn[route] for route in ROUTES},
            "observed": self._observed,
            "last": dict(self._last),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken. Raises PivotTraceError, naming both fingerprints, if
        it belongs to other prompts, routes or settings; the curriculum is then unchanged."""
        if state.get("format") != 1:
            raise PivotTraceError(
                f"The curriculum's state has format {state.get('format')}, but this version reads "
                "format 1."
            )
        if state["fingerprint"] != self._fingerprint:
            raise PivotTraceError(
                f"The saved curriculum {state['fingerprint']} belongs to other prompts, routes or "
                f"settings than this one, {self._fingerprint}."
            )
        if not 0 <= state["position"] <= len(self._items) or state["pass"] < 0:
            raise PivotTraceError(
                f"The saved curriculum stands at prompt {state['position']} of pass "
                f"{state['pass']}, but a pass has {len(self._items)} prompts."
            )
        self._pass = int(state["pass"])
        self._position = int(state["position"])
        self._order = self._lay_out(self._pass)
        self._drawn = Counter({route: int(state["drawn"][route]) for route in ROUTES})
        self._observed = int(state["observed"])
        self._last = {name: float(value) for name, value in state["last"].items()}
