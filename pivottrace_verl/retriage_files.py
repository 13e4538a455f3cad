"""Re-triage and the run directory: where it starts from, requests out, labels in.

Contract: of the run it reads the plan, the scores' numbers, the probes' answers and the ledger; a
label that is not in the ledger is nowhere. It writes RUN/train/requests/step-*.csv, queue files as
`annotate export` makes them, never over a file that is there, and RUN/train/arrivals.jsonl, which
says at which step each label came into use: a resumed run uses it from that step on, too, though it
may be there earlier.

    feed = LabelFeed(run, waiting)
    feed.arrived(step)                 # {pt_id: label} new at this step

Axes: P prompts of training.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pivottrace_verl.annotation.formats import read_annotations, write_queue
from pivottrace_verl.annotation.queue import COLUMNS
from pivottrace_verl.calibration import PREFIX, outcomes
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.files import write_bytes_atomic
from pivottrace_verl.plan import TriageConfig
from pivottrace_verl.pool import RunDir
from pivottrace_verl.prompts import render
from pivottrace_verl.retriage import Retriage, RetriageConfig

_COUNTS = ("n_rollouts", "truncated", "unparseable", "timed_out")


def start_retriage(run: RunDir, pt_ids: Sequence[str], config: RetriageConfig) -> Retriage:
    """Re-triage of a run whose training holds the prompts [P], in that order.

    Raises PivotTraceError if one of them is not in the run's plan, or re-triage cannot work with
    the plan's settings.
    """
    info = run.triage()
    settings = TriageConfig(
        **{**info["config"], "estimator": info["estimator"], "direction": info["direction"]}
    )
    plan = run.plan()
    column = PREFIX + settings.estimator
    labels = run.ledger().labels()
    table = run.scores(columns=["pt_id", *_COUNTS, column])
    ids = table["pt_id"].combine_chunks()
    at = pc.index_in(pa.array(pt_ids, pa.string()), value_set=ids)
    if at.null_count:
        stranger = pt_ids[int(np.flatnonzero(np.asarray(pc.is_null(at)))[0])]
        raise PivotTraceError(
            f"{at.null_count} training prompts are not in the run {run.path} (first: {stranger}): "
            "pivottrace.run must be the run directory that the training files were made from."
        )
    wanted = set(run.probes()["pt_ids"])
    probed = {pt_id: label for pt_id, label in labels.items() if pt_id in wanted}
    beside = np.array(pc.is_in(ids, value_set=pa.array(sorted(wanted), pa.string())))
    beside[np.asarray(at)] = False
    rows = pa.array(np.concatenate([np.asarray(at), np.flatnonzero(beside)]))
    table = table.append_column("cost", plan["cost"])
    table = table.append_column("data_source", run.pool_table(["data_source"])["data_source"])
    answered = run.scores(columns=["pt_id", "n_rollouts", "answers", "majority"])
    answered = answered.filter(pc.is_in(ids, value_set=pa.array(list(probed), pa.string())))
    found = outcomes(answered, probed, run.manifest["answers"]["kind"])
    return Retriage(table.take(rows).combine_chunks(), len(pt_ids), found, settings, config)


class LabelFeed:
    """Labels that arrive in the ledger while training runs."""

    def __init__(self, run: RunDir, waiting: Collection[str]) -> None:
        """`waiting` are the prompts of training that have no label in its files."""
        self._ledger = run.ledger()
        self._log = run.path / "train" / "arrivals.jsonl"
        self._waiting = set(waiting)
        self._state: tuple[int, int] | None = None
        self._arrivals = _read_log(self._log)
        self._used: dict[str, str] = {}
        self.spent = 0.0
        """Cost of all labels in the ledger."""
        self.bought: list[str] = []
        """All prompts with a label, those apart that training does not use yet."""

    def arrived(self, step: int) -> dict[str, str]:
        """pt_id -> label of those that come into use at this step; they are logged first."""
        now = _stat(self._ledger.path)
        held = any(pt_id not in self._used for pt_id in self._arrivals)
        if now == self._state and not held:
            return {}
        self._state = now
        labels = self._ledger.labels()
        new = {
            pt_id: label
            for pt_id, label in labels.items()
            if pt_id in self._waiting
            and pt_id not in self._used
            and self._arrivals.get(pt_id, step) <= step
        }
        unlogged = [pt_id for pt_id in new if pt_id not in self._arrivals]
        if unlogged:
            self._arrivals |= dict.fromkeys(unlogged, step)
            write_bytes_atomic(self._log, _log_lines(self._arrivals))
        self._use(labels, new)
        return new

    def _use(self, labels: Mapping[str, str], new: Mapping[str, str]) -> None:
        self._used |= new
        self.spent = self._ledger.spent()
        unused = self._waiting - set(self._used)
        self.bought = [pt_id for pt_id in labels if pt_id not in unused]

    def label(self, pt_id: str) -> str | None:
        """The label of a prompt that had none in the training files; None while it is not used."""
        return self._used.get(pt_id)

    def state_dict(self) -> dict[str, Any]:
        """The prompts whose label came into use; the labels stay in the ledger."""
        return {"used": list(self._used)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """PivotTraceError if a label that was used is no longer in the ledger."""
        labels = self._ledger.labels()
        lost = [pt_id for pt_id in state["used"] if pt_id not in labels]
        if lost:
            raise PivotTraceError(
                f"The saved training used {len(lost)} labels that {self._ledger.path} does not "
                f"hold (first: that of prompt {lost[0]})."
            )
        self._used = {}
        self._use(labels, {pt_id: labels[pt_id] for pt_id in state["used"]})


def _stat(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns


def _read_log(path: Path) -> dict[str, int]:
    if not path.exists():
        return {}
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return {entry["pt_id"]: int(entry["step"]) for entry in entries}


def _log_lines(arrivals: Mapping[str, int]) -> bytes:
    rows = ({"step": step, "pt_id": pt_id} for pt_id, step in arrivals.items())
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_request(
    folder: Path, step: int, prompts: Iterable[Mapping[str, Any]], uncertainty: Mapping[str, float]
) -> Path | None:
    """Write the prompts (`pt_id`, `prompt` messages, `data_source`) as a queue file, in their
    order; None if files of the folder ask for all of them already, as after a resume."""
    asked = {
        row.pt_id for path in folder.glob("step-*.csv") for row in read_annotations(path, "csv")
    }
    rows = [
        {
            "pt_id": prompt["pt_id"],
            "prompt": render(prompt["prompt"]),
            "data_source": prompt["data_source"],
            "uncertainty": uncertainty[prompt["pt_id"]],
            "majority": None,
            "label": "",
        }
        for prompt in prompts
        if prompt["pt_id"] not in asked
    ]
    if not rows:
        return None
    path = folder / f"step-{step:06d}.csv"
    again = 1
    while path.exists():
        path = folder / f"step-{step:06d}-{again}.csv"
        again += 1
    write_queue(path, rows, list(COLUMNS), "csv")
    return path


def budget_left(run: RunDir, config: RetriageConfig, n_bought: int, spent: float) -> float | None:
    """Labels, or cost, that the budget leaves; None if there is no budget, or no plan."""
    if not (run.path / "triage.json").exists():
        return None
    settings = run.triage().get("config", {})  # a plan made by hand has none
    budget = settings.get("budget") if config.budget is None else config.budget
    if budget is not None:
        return float(budget - n_bought)
    cost = settings.get("budget_cost")
    return None if cost is None else float(cost - spent)
