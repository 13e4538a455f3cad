"""Labels that arrive in the ledger while training runs, and the budget that they leave.

Contract: a label that is not in the ledger is nowhere. RUN/train/arrivals.jsonl says of each label
from which step on it is used (`step`) and at the end of which step it first counted against the
budget (`counted`): a resumed run does the same at the same steps, though the label may be there
earlier.

    feed = LabelFeed(run, ledger, waiting)
    feed.arrived(step)                 # {pt_id: label} used from this step on
    feed.bought(step)                  # what counts against the budget when the step has ended
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.ledger import Ledger
from pivottrace_verl.pool import RunDir
from pivottrace_verl.retriage import RetriageConfig
from pivottrace_verl.retriage_files import read_log, write_log


@dataclass(frozen=True)
class Bought:
    """Labels that count against the budget."""

    used: list[str]
    """Prompts whose label training uses, or that it does not train on."""
    unused: list[str]
    """Prompts whose label came while the step ran; it is used from the next on."""
    spent: float
    """Cost of all these labels."""


class LabelFeed:
    """The labels of one run directory, as training takes them in."""

    def __init__(self, run: RunDir, ledger: Ledger, waiting: Collection[str]) -> None:
        """`waiting` are the prompts of training that have no label in its files."""
        self._ledger = ledger
        self._log = run.path / "train" / "arrivals.jsonl"
        self._waiting = set(waiting)
        self._state: tuple[int, int] | None = None
        # Earlier versions counted a label only when it was used.
        self._arrivals = {
            i: {"counted": row["step"], **row} for i, row in read_log(self._log).items()
        }
        self._used: dict[str, str] = {}
        self._held = self._unused()

    def _unused(self) -> dict[str, int]:
        """Prompt -> the step from which the label that came for it is used, of those not used."""
        return {
            pt_id: row["step"]
            for pt_id, row in self._arrivals.items()
            if pt_id in self._waiting and pt_id not in self._used
        }

    def arrived(self, step: int) -> dict[str, str]:
        """pt_id -> label of those that come into use at this step, before its prompts are drawn;
        they are logged first."""
        self._look(used_from=step, counted=step)
        due = [pt_id for pt_id, used_from in self._held.items() if used_from <= step]
        if not due:
            return {}
        labels = self._ledger.labels()
        new = {pt_id: labels[pt_id] for pt_id in due if pt_id in labels}
        for pt_id in new:
            del self._held[pt_id]
        self._used |= new
        return new

    def bought(self, step: int) -> Bought:
        """What was bought by now, at the end of a step."""
        self._look(used_from=step + 1, counted=step)
        cost: dict[str, float] = {}
        for entry in self._ledger.entries():
            cost.setdefault(entry["pt_id"], entry["cost"])
        used = [i for i in cost if i not in self._waiting or i in self._used]
        counted = {i for i in self._held if self._arrivals[i]["counted"] <= step}
        unused = [i for i in cost if i in counted]
        return Bought(used, unused, float(sum(cost[i] for i in (*used, *unused))))

    def _look(self, used_from: int, counted: int) -> None:
        """Log the labels that nobody has seen yet."""
        now = _stat(self._ledger.path)
        if now == self._state:
            return
        self._state = now
        new = [
            pt_id
            for pt_id in self._ledger.labels()
            if pt_id in self._waiting and pt_id not in self._arrivals
        ]
        if new:
            self._arrivals |= {pt_id: {"step": used_from, "counted": counted} for pt_id in new}
            self._held |= dict.fromkeys(new, used_from)
            write_log(self._log, self._arrivals)

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
        self._used = {pt_id: labels[pt_id] for pt_id in state["used"]}
        self._held = self._unused()


class BudgetLeft:
    """Labels, or cost, that the budget leaves, as the ledger stands."""

    def __init__(self, run: RunDir, ledger: Ledger, config: RetriageConfig) -> None:
        self._ledger = ledger
        self._state: tuple[int, int] | None = None
        self._left: float | None = None
        # A plan made by hand has no settings.
        planned = ((run.path / "triage.json").exists() and run.triage().get("config")) or {}
        labels = planned.get("budget") if config.budget is None else config.budget
        self._labels: int | None = labels
        self._cost: float | None = planned.get("budget_cost")

    def now(self) -> float | None:
        """None if there is no budget."""
        state = _stat(self._ledger.path)
        if self._left is None or state != self._state:
            self._state = state
            if self._labels is not None:
                self._left = float(self._labels - len(self._ledger.labels()))
            elif self._cost is not None:
                self._left = float(self._cost - self._ledger.spent())
        return self._left


def _stat(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns
