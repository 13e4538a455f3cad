"""Parquet queue files, for annotators who work in a notebook."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pivottrace_verl.annotation.formats.rows import Fault, report
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.files import read_table, write_table_atomic

_NUMBERS = {
    **dict.fromkeys(("uncertainty", "cost"), pa.float64()),
    **dict.fromkeys(("rank", "n_rollouts", "unparseable", "truncated", "timed_out"), pa.int64()),
}


def write(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """All rows, atomically: text columns, but numbers for those of `_NUMBERS`."""
    schema = pa.schema([(name, _NUMBERS.get(name, pa.string())) for name in columns])
    table = pa.table(
        {
            name: pa.array([row.get(name) for row in rows], type=schema.field(name).type)
            for name in columns
        },
        schema=schema,
    )
    write_table_atomic(path, table)


def rows(
    path: Path, needed: Sequence[str], faults: list[Fault] | None = None
) -> list[tuple[str, dict[str, Any]]]:
    """(where, row) of every row, counted from 1.

    Raises PivotTraceError if the file is unreadable or lacks one of the columns `needed`. A row
    whose pt_id is not text goes to `faults`, or is raised if that is None.
    """
    table = read_table(path)
    missing = [name for name in needed if name not in table.column_names]
    if missing:
        raise PivotTraceError(
            f"{path} has no column {', '.join(missing)}; its columns are "
            f"{', '.join(table.column_names)[:200] or 'none'}."
        )
    out: list[tuple[str, dict[str, Any]]] = []
    for number, row in enumerate(table.to_pylist(), start=1):
        where = f"row {number}"
        if isinstance(row.get("pt_id", ""), str):
            out.append((where, row))
        else:
            report(path, faults, Fault(where, "has a pt_id that is not text", row))
    return out
