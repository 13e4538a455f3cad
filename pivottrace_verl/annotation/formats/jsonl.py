"""JSONL queue files: one object a line, null where a value is unknown."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pivottrace_verl.annotation.formats.rows import Fault, report
from pivottrace_verl.annotation.formats.text import read_text
from pivottrace_verl.files import json_reason, write_bytes_atomic


def write(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """All rows, atomically."""
    lines = [
        json.dumps({name: row.get(name) for name in columns}, ensure_ascii=False, allow_nan=False)
        for row in rows
    ]
    write_bytes_atomic(path, "".join(line + "\n" for line in lines).encode())


def rows(
    path: Path, needed: Sequence[str], faults: list[Fault] | None = None
) -> list[tuple[str, dict[str, Any]]]:
    """(where, row) of every row.

    Raises PivotTraceError if the file is unreadable. A line that is no JSON object with all of
    `needed` and a pt_id of text goes to `faults`, or is raised if that is None.
    """
    out: list[tuple[str, dict[str, Any]]] = []
    # Only a newline ends a line: prompts may hold other line separators of Unicode.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            report(path, faults, Fault(where, f"is not JSON: {json_reason(error)}", line[:1000]))
            continue
        missing = [name for name in needed if not isinstance(row, dict) or name not in row]
        if missing:
            report(path, faults, Fault(where, f"has no {', '.join(missing)}", row))
        elif not isinstance(row.get("pt_id", ""), str):
            report(path, faults, Fault(where, "has a pt_id that is not text", row))
        else:
            out.append((where, row))
    return out
