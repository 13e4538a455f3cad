"""Formats of queue files, one module each, chosen by suffix or by name.

Contract: `write_queue` writes rows with an empty label; `read_annotations` gives back what
annotators made of them, each row as an annotation or as a fault. csv, jsonl and parquet are
tables with `pt_id` and `label`, and if there, `annotator` and `cost`; label-studio and argilla are
the JSON those tools import and export.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from pivottrace_verl.annotation.formats import argilla, csv_file, jsonl, label_studio, parquet
from pivottrace_verl.annotation.formats.rows import Annotation, Fault, from_table
from pivottrace_verl.errors import PivotTraceError

TABLES: dict[str, ModuleType] = {"jsonl": jsonl, "csv": csv_file, "parquet": parquet}
TOOLS: dict[str, ModuleType] = {"label-studio": label_studio, "argilla": argilla}
KEYS = ("pt_id", "label")

# The first that fits: .argilla.json before .json.
_SUFFIXES = {
    ".jsonl": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".argilla.json": "argilla",
    ".json": "label-studio",
}


def format_of(path: Path, name: str | None = None) -> str:
    """The format's name: `name` if it is one, else by the file's suffix; PivotTraceError if
    neither says."""
    if name is not None:
        if name not in TABLES and name not in TOOLS:
            raise PivotTraceError(
                f"The format '{name}' is not one of {', '.join([*TABLES, *TOOLS])}."
            )
        return name
    for suffix, found in _SUFFIXES.items():
        if path.name.endswith(suffix):
            return found
    raise PivotTraceError(
        f"{path} is neither a .jsonl nor a .csv, .parquet, .json (Label Studio) or .argilla.json "
        f"file; name its format: {', '.join([*TABLES, *TOOLS])}."
    )


def table_of(path: Path) -> ModuleType:
    """The table format of the file, with `rows` and `write`; PivotTraceError if it has another."""
    name = format_of(path)
    if name not in TABLES:
        raise PivotTraceError(f"{path} is no table: it must be a .jsonl, .csv or .parquet file.")
    return TABLES[name]


def write_queue(
    path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], name: str
) -> None:
    """Rows to annotate, in the order given, atomically."""
    {**TABLES, **TOOLS}[name].write(path, rows, columns)


def read_annotations(path: Path, name: str, faults: list[Fault] | None = None) -> list[Annotation]:
    """Every row of the file; bad ones go to `faults`, or are raised if that is None."""
    if name in TOOLS:
        tool: list[Annotation] = TOOLS[name].read(path, faults)
        return tool
    return from_table(path, TABLES[name].rows(path, KEYS, faults), faults)
