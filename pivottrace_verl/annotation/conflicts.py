"""Conflicts that are still open: RUN/conflicts.json, for whoever has to settle them.

Contract: one record a prompt and file it came from: pt_id, said ([[annotator, label]]), costs (of
each of them), ledger (the label that stands, None if the prompt has none), source_file. An import
replaces the records of its own file, and counts what other files said of prompts without a label.
Only the annotation room reads it: what stands in it was not bought.
"""

import math
from collections.abc import Sequence
from typing import Any

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.files import read_json, write_json_atomic
from pivottrace_verl.pool import RunDir

NAME = "conflicts.json"


def read_all(run: RunDir) -> list[dict[str, Any]]:
    """Every record; PivotTraceError if the file holds something else."""
    path = run.path / NAME
    if not path.exists():
        return []
    records = read_json(path)
    if not isinstance(records, list) or not all(map(_is_conflict, records)):
        raise PivotTraceError(f"{path} is not a list of conflicts; remove it and import again.")
    return records


def _is_conflict(record: Any) -> bool:
    if not isinstance(record, dict) or {"pt_id", "said", "costs", "ledger", "source_file"} - set(
        record
    ):
        return False
    said, costs = record["said"], record["costs"]
    return (
        isinstance(record["pt_id"], str)
        and isinstance(said, list)
        and all(isinstance(pair, list) and list(map(type, pair)) == [str, str] for pair in said)
        and isinstance(costs, list)
        and len(costs) == len(said)
        and all(type(cost) in (int, float) and 0 <= cost < math.inf for cost in costs)
    )


def still_open(run: RunDir) -> list[dict[str, Any]]:
    """Without those of prompts that had no label back then and have one by now."""
    bought = run.ledger().labels()
    return [
        record
        for record in read_all(run)
        if record["ledger"] is not None or record["pt_id"] not in bought
    ]


def replace(
    run: RunDir,
    before: Sequence[dict[str, Any]],
    source_file: str,
    records: Sequence[dict[str, Any]],
) -> None:
    """Put `records` for those of `source_file` among `before`, which `read_all` gave; nothing is
    written where nothing changes."""
    after = [record for record in before if record["source_file"] != source_file]
    after += [{**record, "source_file": source_file} for record in records]
    if after != list(before):
        write_json_atomic(run.path / NAME, after)
