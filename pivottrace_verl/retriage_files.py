"""Re-triage and the run directory: where it starts from, and the requests that go out.

Contract: of the run it reads the plan, the scores' numbers, the probes' answers and the ledger; a
label that is not in the ledger is nowhere. It writes RUN/train/requests/step-*.csv, queue files as
`annotate export` makes them, never over a file that is there, and RUN/train/requests.jsonl, a log
of which prompts they ask for. Once written, a queue file is the annotator's and never read here,
whatever it holds: only `annotate import` reads it.

    requests = Requests(run)
    requests.write(step, prompts, uncertainty)

Axes: P prompts of training.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pivottrace_verl.annotation.formats import write_queue
from pivottrace_verl.annotation.queue import COLUMNS
from pivottrace_verl.calibration import PREFIX, outcomes
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.files import os_reason, write_bytes_atomic
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
    settings = _settings(run)
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


def _settings(run: RunDir) -> TriageConfig:
    """Those the plan was made with; PivotTraceError if it does not say them."""
    info = run.triage()
    config, known = info.get("config"), {field.name for field in dataclasses.fields(TriageConfig)}
    if not isinstance(config, dict) or not {"estimator", "direction"} <= set(info):
        raise PivotTraceError(
            f"Re-triage makes the plan again with its own settings, but {run.path}/triage.json "
            "holds no config, estimator and direction, as a plan made by hand: triage with "
            "`pivottrace triage`, or set pivottrace.retriage.enable=false."
        )
    strange = sorted(set(config) - known)
    if strange:
        raise PivotTraceError(
            f"The plan of {run.path} was made with {', '.join(strange)}, which this version does "
            "not know: triage again, or set pivottrace.retriage.enable=false."
        )
    chosen = {"estimator": info["estimator"], "direction": info["direction"]}
    return TriageConfig(**{**config, **chosen})


class Requests:
    """The prompts that labels were asked for, in files for annotators.

    The file is written before the log: a run that is killed between the two asks again, in a second
    file, and never not at all.
    """

    def __init__(self, run: RunDir) -> None:
        self._folder = run.path / "train" / "requests"
        self._log = run.path / "train" / "requests.jsonl"
        self._asked = {pt_id: row["step"] for pt_id, row in read_log(self._log).items()}

    def until(self, step: int) -> list[str]:
        """Prompts that were asked for at this step or before, by any run."""
        return [pt_id for pt_id, asked in self._asked.items() if asked <= step]

    def after(self, step: int) -> list[str]:
        """Prompts that were asked for at a later step, by a run that was killed since."""
        return [pt_id for pt_id, asked in self._asked.items() if asked > step]

    def write(
        self, step: int, prompts: Iterable[Mapping[str, Any]], uncertainty: Mapping[str, float]
    ) -> tuple[Path, int] | None:
        """Write the prompts (`pt_id`, `prompt` messages, `data_source`) as a queue file, in their
        order, those apart that were asked for before. The file and how many it asks for; None if
        all were, as after a resume."""
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
            if prompt["pt_id"] not in self._asked
        ]
        if not rows:
            return None
        path = self._folder / f"step-{step:06d}.csv"
        again = 1
        while path.exists():
            path = self._folder / f"step-{step:06d}-{again}.csv"
            again += 1
        write_queue(path, rows, list(COLUMNS), "csv")
        self._asked |= {row["pt_id"]: step for row in rows}
        write_log(self._log, {pt_id: {"step": asked} for pt_id, asked in self._asked.items()})
        return path, len(rows)


def read_log(path: Path) -> dict[str, dict[str, int]]:
    """pt_id -> what a log of ours says of it, `step` at least; empty if there is no log."""
    if not path.exists():
        return {}
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        return {
            row.pop("pt_id"): {"step": int(row["step"])} | {k: int(n) for k, n in row.items()}
            for row in rows
        }
    except OSError as error:
        raise PivotTraceError(f"{path} cannot be read: {os_reason(error)}.") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PivotTraceError(
            f"{path} is not the log that training wrote: its lines must be JSON objects of pt_id "
            "and numbers of steps."
        ) from error


def write_log(path: Path, entries: Mapping[str, Mapping[str, int]]) -> None:
    """Replace a log, whole."""
    rows = ({**row, "pt_id": pt_id} for pt_id, row in entries.items())
    write_bytes_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
