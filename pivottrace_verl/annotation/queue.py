"""The queue: prompts out to annotators, as a file in any of `formats`.

Contract: a prompt with a label is not asked for again; an export never replaces labels that were
not imported. Everything in a prompt is untrusted: CSV cells are guarded against formulas, and the
tools' files name fields that show text as text.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pivottrace_verl.annotation.formats import format_of, read_annotations, write_queue
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.files import remove_leftovers
from pivottrace_verl.pool import RunDir
from pivottrace_verl.prompts import render

COLUMNS = ("pt_id", "prompt", "data_source", "uncertainty", "majority", "label")


def waiting(run: RunDir, what: str = "queue") -> list[str]:
    """Prompts without a label: the `probes` drawn, or the plan's `queue`, most uncertain first."""
    if what == "probes":
        wanted = run.probes()["pt_ids"]
    elif what == "queue":
        rows = run.plan().select(["pt_id", "route", "rank"]).to_pylist()
        annotate = [row for row in rows if row["route"] == "annotate"]
        wanted = [row["pt_id"] for row in sorted(annotate, key=lambda row: row["rank"])]
    else:
        raise PivotTraceError(f"--what must be probes or queue, not {what!r}.")
    labelled = run.ledger().labels()
    return [pt_id for pt_id in wanted if pt_id not in labelled]


def queue_rows(run: RunDir, pt_ids: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows to annotate, in the order given, and their columns.

    `prompt` is rendered text, `uncertainty` the plan's if there is a plan, `majority` the
    policy's own vote if there are scores, `label` empty. `cost` is there if the plan names one
    other than 1 for any of them; otherwise the cost is left to the import. Raises PivotTraceError
    for ids that are not in the pool or there twice.
    """
    prompts = {prompt.pt_id: prompt for prompt in run.pool()}
    unknown = [pt_id for pt_id in pt_ids if pt_id not in prompts]
    if unknown:
        raise PivotTraceError(
            f"{len(unknown)} prompts to annotate are not in the pool (first: {unknown[0]})."
        )
    if len(set(pt_ids)) != len(pt_ids):
        raise PivotTraceError("A prompt is in the list to annotate more than once.")
    planned: dict[str, dict[str, Any]] = {}
    majority: dict[str, str | None] = {}
    if (run.path / "scores.parquet").exists():
        scores = _rows_of(run.scores(rollouts=False), pt_ids, ("pt_id", "majority"))
        majority = {row["pt_id"]: row["majority"] for row in scores}
        if (run.path / "plan.parquet").exists():
            plan = _rows_of(run.plan(), pt_ids, ("pt_id", "uncertainty", "cost"))
            planned = {row["pt_id"]: row for row in plan}
    columns = list(COLUMNS)
    if any(row.get("cost", 1.0) != 1.0 for row in planned.values()):
        columns.insert(-1, "cost")
    rows = [
        {
            "pt_id": pt_id,
            "prompt": render(prompts[pt_id].messages),
            "data_source": prompts[pt_id].data_source,
            "uncertainty": _known(planned.get(pt_id, {}).get("uncertainty")),
            "majority": majority.get(pt_id),
            "cost": _known(planned.get(pt_id, {}).get("cost")),
            "label": "",
        }
        for pt_id in pt_ids
    ]
    return rows, columns


def _rows_of(table: pa.Table, pt_ids: Sequence[str], names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of these prompts, with those of the columns that there are."""
    table = table.select([name for name in names if name in table.column_names])
    wanted = pc.is_in(table["pt_id"], value_set=pa.array(pt_ids, pa.string()))
    rows: list[dict[str, Any]] = table.filter(wanted).to_pylist()
    return rows


def _known(value: float | None) -> float | None:
    """NaN, which no JSON may hold, as None."""
    return None if value is None or math.isnan(value) else value


def export_queue(
    run: RunDir, pt_ids: Sequence[str], path: str | Path, file_format: str | None = None
) -> int:
    """Write `queue_rows` to a file; returns their number.

    Raises PivotTraceError as that does, for an unknown format, and if a file of that name holds
    labels that the ledger does not.
    """
    path = Path(path)
    name = format_of(path, file_format)
    rows, columns = queue_rows(run, pt_ids)
    _keep_work(run, path, name)
    remove_leftovers(path.parent, path.name)
    write_queue(path, rows, columns, name)
    return len(rows)


def _keep_work(run: RunDir, path: Path, name: str) -> None:
    """Refuse to replace a queue file whose labels were never imported."""
    if not path.exists():
        return
    bought = run.ledger().labels()
    unbought = dict.fromkeys(
        found.pt_id
        for found in read_annotations(path, name)
        if found.label != "" and found.pt_id not in bought
    )
    if unbought:
        raise PivotTraceError(
            f"{path} already holds {len(unbought)} labels that are not imported (first: "
            f"{next(iter(unbought))}): import that file, or export under another name."
        )
