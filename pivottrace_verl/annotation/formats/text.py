"""A file's text, and JSON of the sort that annotation tools export: one list of objects."""

import json
from pathlib import Path
from typing import Any

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.files import json_reason, os_reason, write_bytes_atomic


def read_text(path: Path) -> str:
    """UTF-8, a spreadsheet's byte order mark dropped. PivotTraceError if it cannot be read."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise PivotTraceError(f"{path} cannot be read: {os_reason(error)}.") from error
    except UnicodeDecodeError as error:
        raise PivotTraceError(f"{path} is not UTF-8 text: {error.reason}.") from error


def read_json_list(path: Path, what: str) -> list[Any]:
    """The list in a JSON file; PivotTraceError, naming `what` it should be, if there is none."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise PivotTraceError(f"{path} is not JSON: {json_reason(error)}.") from error
    if not isinstance(content, list):
        raise PivotTraceError(
            f"{path} is not {what}: it holds a {type(content).__name__}, but must be a list."
        )
    return content


def write_json_list(path: Path, content: list[Any]) -> None:
    """One object a line, atomically."""
    lines = [json.dumps(item, ensure_ascii=False, allow_nan=False) for item in content]
    write_bytes_atomic(path, ("[\n" + ",\n".join(lines) + "\n]\n").encode())
