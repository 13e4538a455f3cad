"""Steering: all that decides what a step trains on, and how much, behind three calls.

Contract: no verl. `begin` comes before a step's prompts are drawn, `weights` when its advantages
are known, `end` with its records and before the checkpoint is written, which holds `state_dict`.
What re-triage, a guard or a new label changed is returned as sentences, to be logged.

    steering = Steering(items, labelled, SteeringConfig.of(config.pivottrace, batch_size), prompts)
    sentences = steering.begin(step); row = steering.dress(row)
    metrics, sentences = steering.end(step, records)

A row without a bought label carries no true answer from `dress` on, whatever its file holds.

The gauge: votes are measured on labelled prompts, but those that triage sent to annotators are the
ones whose votes it did not trust. So only labelled prompts no more uncertain than the most
uncertain self_train prompt stand for these; all labelled ones do if there is no such prompt.

Axes: P prompts of training.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pivottrace_verl.curriculum import ROUTES, Curriculum, CurriculumConfig, Items
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.guards import Guard, GuardConfig
from pivottrace_verl.mixing import Mixing, MixingConfig
from pivottrace_verl.observed import Observed, observed
from pivottrace_verl.pool import RunDir
from pivottrace_verl.retriage import Retriage, RetriageConfig
from pivottrace_verl.retriage_files import Requests, start_retriage
from pivottrace_verl.retriage_labels import BudgetLeft, LabelFeed
from pivottrace_verl.training.groups import VotePolicy
from pivottrace_verl.training.metrics import step_metrics

Records = Sequence[tuple[str, dict[str, Any]]]

_MEANING = ("answers", "request_seed", "detector", "capture")
_MEANS_NOTHING = ("pivottrace.capture.wire", "pivottrace.capture.timeout_s")


@dataclass(frozen=True)
class SteeringConfig:
    """The block `pivottrace` of the configuration, as far as it steers; checked when made."""

    curriculum: CurriculumConfig
    vote: VotePolicy
    weights: MixingConfig
    guard: GuardConfig
    retriage: RetriageConfig
    rollouts: Mapping[str, int | None]
    """Route -> rollouts of its prompts; None: `default_rollouts`."""
    default_rollouts: int
    run: Path | None
    """The run directory, which re-triage needs."""
    meaning: Mapping[str, Any]
    """Of the rest of the block what rewards and traces hang on, by name in the configuration."""

    @classmethod
    def of(cls, block: Mapping[str, Any], batch_size: int, rollouts: int) -> SteeringConfig:
        """From the block, `data.train_batch_size` and `rollout.n`; PivotTraceError, in a sentence,
        if a setting cannot be."""
        config = cls(
            CurriculumConfig(batch_size=batch_size, **block["curriculum"]),
            VotePolicy(**block["vote"]),
            MixingConfig(**block["weights"]),
            GuardConfig(**block["guard"]),
            RetriageConfig(**block["retriage"]),
            dict(block["rollouts"]),
            rollouts,
            None if block["run"] is None else Path(block["run"]),
            _meaning(block),
        )
        for route, n in config.rollouts.items():
            if n is not None and n < 2:
                raise PivotTraceError(
                    f"pivottrace.rollouts.{route} is {n}; a group needs at least 2 rollouts."
                )
        if config.retriage.enable and config.run is None:
            raise PivotTraceError(
                "pivottrace.retriage.enable is true, but pivottrace.run names no run directory, "
                "which holds the ledger and the plan."
            )
        return config

    def settings(self) -> dict[str, Any]:
        """Name in the configuration -> value, of all but the run directory, which may move."""
        parts = dataclasses.asdict(self)
        del parts["run"]
        found = {"actor_rollout_ref.rollout.n": parts.pop("default_rollouts")}
        found |= parts.pop("meaning")
        found["data.train_batch_size"] = parts["curriculum"].pop("batch_size")
        for part, values in parts.items():
            found |= {f"pivottrace.{part}.{name}": value for name, value in values.items()}
        return found


def _meaning(block: Mapping[str, Any]) -> dict[str, Any]:
    """`meaning` of the block; how a trace travels changes nothing in it."""
    found: dict[str, Any] = {}
    for part in _MEANING:
        value = block.get(part)
        if isinstance(value, Mapping):
            found |= {f"pivottrace.{part}.{name}": inner for name, inner in value.items()}
        else:
            found[f"pivottrace.{part}"] = value
    return {name: value for name, value in found.items() if name not in _MEANS_NOTHING}


def _written(value: Any) -> str:
    """As in the configuration."""
    return value if isinstance(value, str) else json.dumps(value)


class Steering:
    """The curriculum, the weights, the guard and re-triage of one training run."""

    def __init__(
        self,
        items: Items,
        labelled: Sequence[str],
        config: SteeringConfig,
        prompts: Callable[[Sequence[int]], list[Mapping[str, Any]]],
    ) -> None:
        """`labelled` are the prompts with a label in the training files; `prompts` gives `pt_id`,
        `prompt` and `data_source` of rows of the data set."""
        if config.weights.policy == "measured" and not labelled:
            raise PivotTraceError(
                "pivottrace.weights.policy is measured, but no training prompt has a label to "
                "measure votes on."
            )
        self._config = config
        self._prompts = prompts
        self._labelled = set(labelled)
        self.curriculum = Curriculum(items, config.curriculum)
        self._mixing = Mixing(config.weights)
        self._guard = Guard(config.guard)
        self._run = None if config.run is None else RunDir.open(config.run)
        self._retriage: Retriage | None = None
        self._feed: LabelFeed | None = None
        self._requests: Requests | None = None
        self._budget: BudgetLeft | None = None
        if self._run is not None:
            ledger = self._run.ledger()
            self._budget = BudgetLeft(self._run, ledger, config.retriage)
            if config.retriage.enable:
                ids: list[str] = items.pt_id.tolist()
                self._retriage = start_retriage(self._run, ids, config.retriage)
                self._feed = LabelFeed(self._run, ledger, set(ids) - self._labelled)
                self._requests = Requests(self._run)
        self._reach = self.curriculum.reach()
        self.seconds = 0.0
        """Spent here since the latest `end`."""

    def _gauge(self, group: Observed) -> bool:
        return bool(self.curriculum.uncertainty_of([group.pt_id])[0] <= self._reach)

    def _since(self, pt_ids: Sequence[str]) -> list[int]:
        return [int(step) for step in self.curriculum.since(pt_ids)]

    def begin(self, step: int) -> list[str]:
        """Take in the labels that arrived."""
        start = time.perf_counter()
        self.curriculum.begin(step)
        new = {} if self._feed is None else self._feed.arrived(step)
        if new:
            self.curriculum.labelled(list(new))
            self._labelled |= set(new)
            self._reach = self.curriculum.reach()
        self.seconds += time.perf_counter() - start
        if not new:
            return []
        return [
            f"{len(new)} labels arrived and are used from step {step} on (first: prompt "
            f"{next(iter(new))})."
        ]

    def dress(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row of the data set as this step trains on it: its route, its label if one was bought
        (else none), and its number of rollouts where the routes differ in it."""
        start = time.perf_counter()
        info = row["extra_info"]
        pt_id, truth = info["pt_id"], row["reward_model"]["ground_truth"]
        if not info["labeled"]:
            truth = None if self._feed is None else self._feed.label(pt_id)
        route = self.curriculum.route_of(pt_id)
        row = {
            **row,
            "reward_model": {**row["reward_model"], "ground_truth": truth},
            "extra_info": {**info, "route": route, "labeled": truth is not None},
        }
        if any(self._config.rollouts.values()):
            row["__rollout_n__"] = self._config.rollouts[route] or self._config.default_rollouts
        self.seconds += time.perf_counter() - start
        return row

    def weights(self, step: int) -> dict[str, float]:
        """Factor on the advantages of each route."""
        weights = self._mixing.weights(step)
        return {**weights, "self_train": weights["self_train"] * self._guard.factor}

    def end(
        self, step: int, records: Records, set_aside: Records = ()
    ) -> tuple[dict[str, float], list[str]]:
        """Take in the step; returns its metrics, under `pivottrace/`, and what to log.

        `set_aside` are the records of whole groups that verl did not train on (`filter_groups`,
        staleness, surplus). Votes are measured, the guard watches and re-triage learns on all of
        them: groups of one reward would else never be seen where verl filters them.

        Raises PivotTraceError if the guard stops the training.
        """
        start = time.perf_counter()
        weights = self.weights(step)
        weighted = [(k, {**r, "weight": r["weight"] * weights[r["route"]]}) for k, r in records]
        metrics = step_metrics(weighted)
        groups = observed([*records, *set_aside])
        self.curriculum.observe([record for _, record in records])
        known = [g for g in groups if g.labeled and g.votes and self._gauge(g)]
        self._mixing.observe(sum(bool(g.majority_right) for g in known), len(known))
        told = []
        verdict = self._guard.observe(step, groups, self._gauge, self._since)
        if verdict is not None:
            told.append(verdict)
        if self._retriage is not None:
            self._retriage.observe(step, groups)
            if self._retriage.due(step):
                told += self._move(step, self._retriage)
        ours = self.curriculum.metrics() | self._mixing.metrics() | self._guard.metrics()
        if self._retriage is not None:
            ours |= self._retriage.metrics()
        metrics |= {f"pivottrace/{name}": value for name, value in ours.items()}
        left = None if self._budget is None else self._budget.now()
        if left is not None:
            metrics["pivottrace/budget/left"] = left
        for route in ROUTES:
            aside = {key for key, record in set_aside if record["route"] == route}
            metrics[f"pivottrace/set_aside/{route}"] = float(len(aside))
        metrics["pivottrace/seconds/vote"] = float(sum(r["vote_s"] for _, r in records))
        metrics["pivottrace/seconds/trainer"] = self.seconds + time.perf_counter() - start
        self.seconds = 0.0
        return metrics, told

    def _move(self, step: int, retriage: Retriage) -> list[str]:
        """Re-triage, and ask for the labels it wants."""
        feed, run, requests = self._feed, self._run, self._requests
        if feed is None or run is None or requests is None:
            return []
        bought = feed.bought(step)
        retriage.asked_for(requests.until(step))
        moves = retriage.move(
            list(dict.fromkeys([*bought.used, *self._labelled])),
            bought.spent,
            unused=bought.unused,
            reserved=requests.after(step),
        )
        if moves.refused is not None:
            return [f"Re-triage after step {step} changes no route: {moves.refused}"]
        self.curriculum.update(
            annotate=moves.annotate, resting=moves.resting, uncertainty=moves.uncertainty
        )
        self._reach = self.curriculum.reach()
        counts = ", ".join(f"{n:.0f} {name}" for name, n in moves.counts().items())
        told = [f"Re-triage after step {step}: {counts}."]
        if moves.asked:
            prompts = self._prompts(self.curriculum.rows_of(moves.asked))
            u = dict(zip(moves.asked, self.curriculum.uncertainty_of(moves.asked), strict=True))
            written = requests.write(step, prompts, u)
            if written is not None:
                path, n = written
                told.append(
                    f"{n} prompts need a label: fill {path}, then `pivottrace "
                    f"annotate import {run.path} {path}`; training goes on meanwhile."
                )
        return told

    def state_dict(self) -> dict[str, Any]:
        """For verl's checkpoint."""
        return {
            "settings": self._config.settings(),
            "curriculum": self.curriculum.state_dict(),
            "mixing": self._mixing.state_dict(),
            "guard": self._guard.state_dict(),
            "retriage": None if self._retriage is None else self._retriage.state_dict(),
            "labels": None if self._feed is None else self._feed.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken; PivotTraceError, naming both sides, if it belongs to
        other prompts or settings."""
        before, now = state.get("settings", {}), self._config.settings()
        if not now.keys() <= before.keys():
            raise PivotTraceError(
                "The checkpoint's curriculum was saved by an earlier version of PivotTrace, which "
                "this one cannot resume."
            )
        changed = [name for name in now if before[name] != now[name]]
        if changed:
            saved = ", ".join(f"{name}={_written(before[name])}" for name in changed)
            raise PivotTraceError(
                f"The checkpoint was saved with {saved}, but this run has "
                f"{', '.join(_written(now[name]) for name in changed)}."
            )
        self.curriculum.load_state_dict(state["curriculum"])
        self._mixing.load_state_dict(state["mixing"])
        self._guard.load_state_dict(state["guard"])
        if self._retriage is not None and self._feed is not None:
            self._retriage.load_state_dict(state["retriage"])
            self._feed.load_state_dict(state["labels"])
            self._labelled |= set(state["labels"]["used"])
        self._reach = self.curriculum.reach()
