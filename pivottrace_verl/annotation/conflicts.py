"""Conflicts that are still open: RUN/conflicts.json, for whoever has to settle them.

Contract: one record a prompt and file it came from: pt_id, said ([[annotator, label]]), ledger
(the label that stands, None if the prompt has none), source_file. An import replaces the records
of its own file. Only the annotation room reads it: what stands in it was not bought.
"""

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
    keys = {"pt_id", "said", "ledger", "source_file"}
    if not isinstance(records, list) or not all(
        isinstance(record, dict) and keys <= set(record) for record in records
    ):
        raise PivotTraceError(f"{path} is not a list of conflicts; remove it and import again.")
    return records


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
