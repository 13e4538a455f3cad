"""Queue files: rows as JSONL or CSV, by suffix.

Contract: what `write_rows` wrote, `read_rows` reads back, letter by letter. In CSV a cell that a
spreadsheet would run as a formula (it starts with = + - @ tab or return) gets a leading ', and so
does one that starts with ' already; on reading, a ' before any of these goes. A person may type
-5 as well as '-5: both mean -5.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.files import json_reason, os_reason, remove_leftovers, write_bytes_atomic

_GUARDED = ("=", "+", "-", "@", "\t", "\r", "'")
SUFFIXES = (".jsonl", ".csv")


def guard(cell: str) -> str:
    """The cell as it is safe to open in a spreadsheet."""
    return "'" + cell if cell.startswith(_GUARDED) else cell


def unguard(cell: str) -> str:
    """The inverse of `guard`; a cell that was never guarded stays as it is."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_GUARDED) else cell


def check_suffix(path: Path) -> None:
    """PivotTraceError unless the file is one of `SUFFIXES`."""
    if path.suffix not in SUFFIXES:
        raise PivotTraceError(f"{path} is neither a .jsonl nor a .csv file.")


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """All rows, atomically. None is null in JSONL, an empty cell in CSV."""
    check_suffix(path)
    text = io.StringIO(newline="")
    if path.suffix == ".csv":
        writer = csv.writer(text)
        writer.writerow(columns)
        for row in rows:
            cells = ["" if row.get(name) is None else row[name] for name in columns]
            # Our own numbers are no formulas; text may be one.
            writer.writerow([guard(cell) if isinstance(cell, str) else cell for cell in cells])
    else:
        for row in rows:
            line = {name: row.get(name) for name in columns}
            text.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    remove_leftovers(path.parent, path.name)
    write_bytes_atomic(path, text.getvalue().encode())


def read_rows(path: Path, needed: Sequence[str]) -> list[tuple[int, dict[str, Any]]]:
    """(line number, row) of every row. CSV cells are text; an empty one is "".

    Raises PivotTraceError if the file is unreadable or a row lacks one of the `needed` columns.
    """
    check_suffix(path)
    try:
        # utf-8-sig: spreadsheets put a byte order mark in front.
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise PivotTraceError(f"{path} cannot be read: {os_reason(error)}.") from error
    except UnicodeDecodeError as error:
        raise PivotTraceError(f"{path} is not UTF-8 text: {error.reason}.") from error
    return (
        _csv_rows(path, text, needed) if path.suffix == ".csv" else _json_rows(path, text, needed)
    )


def _csv_rows(path: Path, text: str, needed: Sequence[str]) -> list[tuple[int, dict[str, Any]]]:
    # Prompts may be longer than the reader's default limit of 128 KiB a cell.
    csv.field_size_limit(max(len(text) + 1, csv.field_size_limit()))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    out: list[tuple[int, dict[str, Any]]] = []
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
            line = reader.line_num + 1
            cells = next(reader, None)
            if cells is None:
                return out
            if not any(cells):
                continue
            if len(cells) != len(header):
                raise PivotTraceError(
                    f"Line {line} of {path} has {len(cells)} cells, but the header has "
                    f"{len(header)}."
                )
            out.append((line, dict(zip(header, map(unguard, cells), strict=True))))
    except csv.Error as error:
        raise PivotTraceError(
            f"{path} is not a readable CSV file: line {reader.line_num}: {error}."
        ) from error


def _json_rows(path: Path, text: str, needed: Sequence[str]) -> list[tuple[int, dict[str, Any]]]:
    out: list[tuple[int, dict[str, Any]]] = []
    # Only a newline ends a line: prompts may hold other line separators of Unicode.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PivotTraceError(
                f"Line {number} of {path} is not JSON: {json_reason(error)}."
            ) from error
        missing = [name for name in needed if not isinstance(row, dict) or name not in row]
        if missing:
            raise PivotTraceError(f"Line {number} of {path} has no {', '.join(missing)}.")
        if not isinstance(row.get("pt_id", ""), str):
            raise PivotTraceError(f"Line {number} of {path} has a pt_id that is not text.")
        out.append((number, row))
    return out
