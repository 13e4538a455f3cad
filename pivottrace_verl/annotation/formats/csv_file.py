"""CSV queue files, safe to open in a spreadsheet.

Contract: what `write` wrote, `rows` reads back, letter by letter. A cell that a spreadsheet would
run as a formula (it starts with = + - @ tab or return) gets a leading ', and so does one that
starts with ' already; on reading, a ' before any of these goes. A person may type -5 as well as
'-5: both mean -5.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pivottrace_verl.annotation.formats.rows import Fault, report
from pivottrace_verl.annotation.formats.text import read_text
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.files import write_bytes_atomic

_GUARDED = ("=", "+", "-", "@", "\t", "\r", "'")


def guard(cell: str) -> str:
    """The cell as it is safe to open in a spreadsheet."""
    return "'" + cell if cell.startswith(_GUARDED) else cell


def unguard(cell: str) -> str:
    """The inverse of `guard`; a cell that was never guarded stays as it is."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_GUARDED) else cell


def write(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """All rows, atomically; None is an empty cell."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    for row in rows:
        cells = ["" if row.get(name) is None else row[name] for name in columns]
        # Our own numbers are no formulas; text may be one.
        writer.writerow([guard(cell) if isinstance(cell, str) else cell for cell in cells])
    write_bytes_atomic(path, text.getvalue().encode())


def rows(
    path: Path, needed: Sequence[str], faults: list[Fault] | None = None
) -> list[tuple[str, dict[str, Any]]]:
    """(where, row) of every row; cells are text, an empty one is "".

    Raises PivotTraceError if the file is unreadable, is no CSV, or lacks one of the columns
    `needed`. A row of the wrong length goes to `faults`, or is raised if that is None.
    """
    text = read_text(path)
    # Prompts may be longer than the reader's default limit of 128 KiB a cell.
    csv.field_size_limit(max(len(text) + 1, csv.field_size_limit()))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    out: list[tuple[str, dict[str, Any]]] = []
    try:
        header = next(reader, [])
        missing = [name for name in needed if name not in header]
        if missing:
            raise PivotTraceError(
                f"{path} has no column {', '.join(missing)}; its columns are "
                f"{', '.join(header)[:200] or 'none'}."
            )
        twice = [name for name in needed if header.count(name) > 1]
        if twice:
            raise PivotTraceError(f"{path} has the column {', '.join(twice)} twice.")
        while True:
            where = f"line {reader.line_num + 1}"
            cells = next(reader, None)
            if cells is None:
                return out
            if not any(cells):
                continue
            if len(cells) != len(header):
                reason = f"has {len(cells)} cells, but the header has {len(header)}"
                report(path, faults, Fault(where, reason, cells))
                continue
            out.append((where, dict(zip(header, map(unguard, cells), strict=True))))
    except csv.Error as error:
        raise PivotTraceError(
            f"{path} is not a readable CSV file: line {reader.line_num}: {error}."
        ) from error
