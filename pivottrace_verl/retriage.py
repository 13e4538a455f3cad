"""Re-triage: routes that move while the policy learns.

Contract: pure. Every step's groups update the run's estimator for the prompts seen, and the probes'
outcomes; every `every` steps the code that made the plan (`triage`) makes it again from these, with
the probes that are in training as its gauge. A prompt that is newly uncertain is asked for, once,
as long as the budget lasts: prompts asked for count against it from then on, whether or not their
label ever comes. A plan that cannot be made, as when the probes do not confirm the ranking any
more, changes nothing, and is told.
What it decides depends on values, on which prompts have a label, and on outcomes of labelled
prompts; a label itself is never seen here.

    retriage = Retriage(pool, probes, triage_config, RetriageConfig(enable=True, every=50))
    retriage.observe(step, groups)
    if retriage.due(step):
        moves = retriage.move(labelled, spent)

Smoothing: seen again after `age` steps, a value becomes keep * old + (1 - keep) * new with
keep = smoothing * 2^(-age / half_life): the longer ago, the less the old one says of this policy.

Axes: P prompts of training; M >= P prompts with the probes that are not trained on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pivottrace_verl.calibration import PREFIX, Outcome
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.observed import MEASURED, Observed
from pivottrace_verl.plan import TriageConfig
from pivottrace_verl.score_columns import numbers
from pivottrace_verl.triage import FEWEST_PROBES, judged, too_few, triage


@dataclass(frozen=True)
class RetriageConfig:
    """Off, the plan's routes stay, as in the paper."""

    enable: bool = False
    every: int = 50
    """Steps between two re-triages."""
    smoothing: float = 0.5
    """What an old value keeps if it is measured again at once, in [0, 1)."""
    half_life: float = 100.0
    """Steps in which that halves."""
    budget: int | None = None
    """Labels in all, probes included; None: the budget of the plan."""

    def __post_init__(self) -> None:
        if self.every < 1 or not 0.0 <= self.smoothing < 1.0 or not self.half_life > 0.0:
            raise PivotTraceError(
                f"Re-triage every {self.every} steps with smoothing {self.smoothing} and half-life "
                f"{self.half_life} cannot be: they must be at least 1, in [0, 1) and above 0."
            )
        if self.budget is not None and self.budget < 0:
            raise PivotTraceError(f"The label budget is {self.budget}, but must not be negative.")


@dataclass(frozen=True)
class Moves:
    """What a re-triage decided, [P] each."""

    annotate: NDArray[np.bool_]
    resting: NDArray[np.bool_]
    """Mastered, over the budget, or waiting for a label."""
    uncertainty: NDArray[np.float64]
    """Rank in [0, 1]."""
    asked: list[str] = field(default_factory=list)
    """Prompts whose label is asked for now, most uncertain first."""
    refused: str | None = None
    """Why nothing moves; the columns are then empty."""

    def counts(self) -> dict[str, float]:
        """Prompts trained on by route, and at rest."""
        awake = ~self.resting
        return {
            "annotate": float((self.annotate & awake).sum()),
            "self_train": float((~self.annotate & awake).sum()),
            "resting": float(self.resting.sum()),
        }


class Retriage:
    """The running uncertainty of the prompts, and the routes that follow from it."""

    def __init__(
        self,
        pool: pa.Table,
        n_trained: int,
        probes: Sequence[Outcome],
        triage_config: TriageConfig,
        config: RetriageConfig,
    ) -> None:
        """`pool` [M] has a row for each prompt of training, these first (P = `n_trained`), and for
        each probe: columns pt_id, n_rollouts, truncated, unparseable, timed_out, cost, data_source,
        and the estimator of `triage_config`, whose direction is decided. Labels of other prompts
        count against the budget, but not against their source's quota.

        Raises PivotTraceError if training does not measure the estimator, the probes are too few,
        or nothing caps the labels that may be asked for.
        """
        if triage_config.estimator not in MEASURED:
            raise PivotTraceError(
                f"Re-triage needs an estimator that training measures ({', '.join(MEASURED)}), but "
                f"the plan was made by '{triage_config.estimator}': triage with one of those, or "
                "set pivottrace.retriage.enable=false."
            )
        budget = triage_config.budget if config.budget is None else config.budget
        if budget is None and triage_config.budget_cost is None:
            raise PivotTraceError(
                "Re-triage asks for labels, but neither the plan nor pivottrace.retriage.budget "
                "says how many there may be."
            )
        sound = judged(pool, probes, triage_config)
        if len(sound) < FEWEST_PROBES:
            raise too_few(len(sound), len(probes) - len(sound))
        self._config = config
        sources = set(pc.unique(pool["data_source"]).to_pylist())
        self._triage = dataclasses.replace(
            triage_config,
            budget=budget,
            budget_cost=triage_config.budget_cost if config.budget is None else None,
            # A source whose prompts all were dropped is not in training.
            quotas={name: n for name, n in triage_config.quotas.items() if name in sources},
            # Floors were bought before training; the intervals are not looked at here.
            floors={},
            draws=1,
        )
        self._pool = pool
        self._n_trained = n_trained
        self._place = {pt_id: place for place, pt_id in enumerate(pool["pt_id"].to_pylist())}
        self._column = PREFIX + triage_config.estimator
        self._values = numbers(pool, self._column)
        self._seen = np.zeros(len(self._values), dtype=np.int32)
        self._cost = numbers(pool, "cost")
        self._probes = {probe.pt_id: probe for probe in probes}
        self._asked: list[str] = []
        self._last: dict[str, float] = {}

    def observe(self, step: int, groups: Iterable[Observed]) -> None:
        """Take in one step's groups; those of unknown prompts or without a value are passed by."""
        for group in groups:
            place = self._place.get(group.pt_id)
            value = group.values.get(self._triage.estimator)
            if place is None or value is None or not math.isfinite(value):
                continue
            age = max(0, step - int(self._seen[place]))
            keep = self._config.smoothing * 2.0 ** (-age / self._config.half_life)
            old = self._values[place]
            self._values[place] = value if math.isnan(old) else keep * old + (1 - keep) * value
            self._seen[place] = step
            probe = self._probes.get(group.pt_id)
            if probe is not None and group.pass_rate is not None:
                self._probes[group.pt_id] = Outcome(
                    group.pt_id,
                    keep * probe.pass_rate + (1 - keep) * group.pass_rate,
                    bool(group.majority_right),
                )

    def due(self, step: int) -> bool:
        """Whether a re-triage follows this step."""
        return self._config.enable and step % self._config.every == 0

    def asked_for(self, pt_ids: Iterable[str]) -> None:
        """Take in prompts whose label was asked for by now, known or not: a run that goes on from a
        checkpoint learns so what it asked for after that."""
        known = set(self._asked)
        self._asked += [i for i in pt_ids if i in self._place and i not in known]

    def move(
        self,
        labelled: Sequence[str],
        spent: float,
        *,
        unused: Sequence[str] = (),
        reserved: Iterable[str] = (),
    ) -> Moves:
        """The routes as the values stand now.

        `labelled` are the prompts, each once, whose label was bought and is used by now, `unused`
        those whose label is used from the next step on, `spent` what all these labels have cost.
        `reserved` were asked for at a later step of a run that was killed since: they take their
        share of the budget and are else as any other.
        """
        table = self._pool.set_column(
            self._pool.schema.get_field_index(self._column), self._column, pa.array(self._values)
        )
        have = np.asarray(pc.is_in(self._pool["pt_id"], value_set=pa.array(labelled, pa.string())))
        elsewhere = len(labelled) - int(have.sum())
        coming = set(unused)
        promised = [i for i in self._asked if i not in coming and not have[self._place[i]]]
        kept = coming | set(self._asked)
        kept_back = [
            i for i in reserved if i in self._place and i not in kept and not have[self._place[i]]
        ]
        budget = self._triage.budget
        config = dataclasses.replace(
            self._triage,
            budget=None if budget is None else max(0, budget - elsewhere - len(kept_back)),
        )
        priced = self._cost[[self._place[i] for i in (*promised, *kept_back)]].sum()
        try:
            plan = triage(
                table,
                list(self._probes.values()),
                [*labelled, *unused, *promised],
                config,
                sources=table["data_source"] if config.quotas else None,
                costs=self._cost,
                spent=spent + float(priced),
            )
        except PivotTraceError as refusal:
            empty = np.empty(0)
            self._last = {"refused": 1.0}
            return Moves(empty > 0, empty > 0, empty, refused=str(refusal))
        asked = plan.to_buy()
        self._asked += asked
        rows = plan.rows.slice(0, self._n_trained)
        owned = have[: self._n_trained]
        to_label = np.asarray(pc.equal(rows["route"], "annotate"))
        voted = np.asarray(pc.equal(rows["route"], "self_train"))
        moves = Moves(
            # At rest, too, a prompt comes now and then: with its label, if it has one.
            annotate=to_label | owned,
            resting=~(voted | (to_label & owned)),
            uncertainty=np.asarray(rows["uncertainty"], dtype=np.float64),
            asked=asked,
        )
        self._last = {
            "refused": 0.0,
            "asked": float(len(self._asked)),
            "waiting": float(len(promised) + len(asked)),
            "over_budget": float(plan.labels["over_budget"]),
            "spearman": plan.spearman,
            **moves.counts(),
        }
        return moves

    def metrics(self) -> dict[str, float]:
        """Flat floats under `retriage/`: the latest decision. refused: no plan could be made;
        asked: labels asked for so far; waiting: of those, not there yet."""
        return {f"retriage/{name}": value for name, value in self._last.items()}

    def state_dict(self) -> dict[str, Any]:
        """Two numbers a prompt; the probes' outcomes; the prompts asked for."""
        return {
            "values": self._values.copy(),
            "seen": self._seen.copy(),
            "probes": [dataclasses.astuple(probe) for probe in self._probes.values()],
            "asked": list(self._asked),
            "last": dict(self._last),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken; PivotTraceError if it is of another pool."""
        if len(state["values"]) != len(self._values):
            raise PivotTraceError(
                f"The saved re-triage has {len(state['values'])} prompts, but this run has "
                f"{len(self._values)}."
            )
        self._values = np.array(state["values"], dtype=np.float64)
        self._seen = np.array(state["seen"], dtype=np.int32)
        self._probes = {row[0]: Outcome(*row) for row in state["probes"]}
        self._asked = list(state["asked"])
        self._last = dict(state["last"])
