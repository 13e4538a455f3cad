"""Prompts: a pool file or a validation file read into distinct chat prompts.

Contract: of a pool only the columns `prompt` and `data_source` are loaded; whatever ground truth
the file holds is left where it is, by column projection where the format allows it. Equal prompts
are one prompt, counted. Formats: .parquet, .jsonl, a folder written by `datasets.save_to_disk`.

Axes: P prompts.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.files import arrow_reason, fingerprint, json_reason, os_reason, read_json

DEFAULT_SOURCE = "pool"


@dataclass(frozen=True)
class Prompt:
    """One distinct prompt of the pool."""

    pt_id: str
    """First 16 hex digits of SHA-256 over the messages and the data source."""
    messages: list[dict[str, str]]
    """`role` and `content` of each message."""
    data_source: str


@dataclass(frozen=True)
class PoolFile:
    """What a pool file held."""

    prompts: list[Prompt]
    """[P] distinct, in the order of their first appearance."""
    rows: list[int]
    """[P] the file's row of that first appearance."""
    duplicates: int
    """Rows that repeated an earlier prompt."""


def pt_id(messages: list[dict[str, str]], data_source: str) -> str:
    """The prompt's name everywhere: the same messages and source give the same id."""
    return fingerprint({"prompt": messages, "data_source": data_source})


def render(messages: list[dict[str, str]]) -> str:
    """The messages as plain text for a person: a single user message as it is, otherwise each
    under its role."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    return "\n\n".join(f"[{m['role']}]\n{m['content']}" for m in messages)


def read_pool(path: Path) -> PoolFile:
    """The distinct prompts of a pool file.

    Raises PivotTraceError if the file is unreadable, holds no prompt, or holds one that is not a
    chat (a list of messages with role and content, both text).
    """
    prompts: dict[str, tuple[int, Prompt]] = {}
    rows = 0
    for rows, row in enumerate(_rows(path, ["prompt", "data_source"]), start=1):
        prompt = _prompt(row, f"row {rows} of {path}")
        prompts.setdefault(prompt.pt_id, (rows - 1, prompt))
    if not prompts:
        raise PivotTraceError(f"{path} holds no prompts.")
    return PoolFile(
        prompts=[prompt for _, prompt in prompts.values()],
        rows=[row for row, _ in prompts.values()],
        duplicates=rows - len(prompts),
    )


def read_validation(path: Path) -> tuple[list[tuple[Prompt, str]], int]:
    """(prompt, label) of each distinct validation prompt, and the number of merged duplicates.

    The label is `label` or else `reward_model.ground_truth`: validation data comes with its
    answers. Raises PivotTraceError as `read_pool` does, for a row without a label, and for a
    prompt that has two.
    """
    found: dict[str, tuple[Prompt, str]] = {}
    rows = 0
    for rows, row in enumerate(
        _rows(path, ["prompt", "data_source", "label", "reward_model"]), start=1
    ):
        where = f"row {rows} of {path}"
        prompt = _prompt(row, where)
        label = row.get("label")
        if label is None and isinstance(row.get("reward_model"), Mapping):
            label = row["reward_model"].get("ground_truth")
        text = _label(label, where)
        before = found.setdefault(prompt.pt_id, (prompt, text))
        if before[1] != text:
            raise PivotTraceError(
                f"The validation prompt in {where} has the label '{text}', but an earlier row has "
                f"'{before[1]}' for the same prompt."
            )
    if not found:
        raise PivotTraceError(f"{path} holds no validation prompts.")
    return list(found.values()), rows - len(found)


def _label(label: Any, where: str) -> str:
    """A validation label as text; PivotTraceError unless it is text or a finite number."""
    if isinstance(label, float) and not math.isfinite(label):
        raise PivotTraceError(
            f"The label of the validation prompt in {where} is {label}, but must be text or a "
            "finite number."
        )
    if isinstance(label, (int, float)) and not isinstance(label, bool):
        label = str(label)
    if label is None or label == "":
        raise PivotTraceError(f"The validation prompt in {where} has no label.")
    if not isinstance(label, str):
        raise PivotTraceError(
            f"The label of the validation prompt in {where} is {_kind(label)}, but must be text or "
            "a number."
        )
    try:
        label.encode()
    except UnicodeEncodeError as error:
        raise PivotTraceError(
            f"The label of the validation prompt in {where} is not valid Unicode: {error.reason}."
        ) from error
    if not label.strip():
        raise PivotTraceError(f"The validation prompt in {where} has no label.")
    return label.strip()


def _prompt(row: Mapping[str, Any], where: str) -> Prompt:
    messages = row.get("prompt")
    if not isinstance(messages, list) or not messages:
        what = "an empty list" if messages == [] else _kind(messages)
        raise PivotTraceError(
            f"The prompt in {where} is not a chat: it is {what}, but must be a list of messages "
            "with role and content."
        )
    source = row.get("data_source")
    if source is None:
        source = DEFAULT_SOURCE
    if not isinstance(source, str):
        raise PivotTraceError(f"The data_source in {where} is {_kind(source)}, but must be text.")
    clean = [_message(message, where) for message in messages]
    try:
        return Prompt(pt_id(clean, source), clean, source)
    except UnicodeEncodeError as error:
        raise PivotTraceError(
            f"The prompt in {where} holds text that is not valid Unicode: {error.reason}."
        ) from error


def _kind(value: Any) -> str:
    """What a value is, in words that fit JSON and Parquet."""
    names = {type(None): "missing", str: "text", bool: "a truth value", list: "a list"}
    names |= {int: "a number", float: "a number", dict: "an object"}
    return names.get(type(value), f"of type {type(value).__name__}")


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, Mapping) or not all(
        isinstance(message.get(name), str) for name in ("role", "content")
    ):
        raise PivotTraceError(
            f"The prompt in {where} is not a chat: a message needs role and content, both text."
        )
    # Parquet fills fields that other messages have with null; a value would be lost silently.
    extra = sorted(k for k, v in message.items() if k not in ("role", "content") and v is not None)
    if extra:
        raise PivotTraceError(
            f"The prompt in {where} has a message with {', '.join(extra)}: only role and content "
            "are supported."
        )
    return {"role": message["role"], "content": message["content"]}


def _rows(path: Path, columns: list[str]) -> Iterator[Mapping[str, Any]]:
    """The file's rows, one dict each, with those of `columns` that the file has."""
    try:
        if path.is_dir():
            yield from _rows_of_folder(path, columns)
        elif path.suffix == ".parquet":
            yield from _rows_of_parquet(path, columns)
        elif path.suffix == ".jsonl":
            yield from _rows_of_jsonl(path, columns)
        else:
            raise PivotTraceError(
                f"{path} is neither a .parquet nor a .jsonl file nor a saved datasets folder."
            )
    except OSError as error:
        raise PivotTraceError(
            f"{error.filename or path} cannot be read: {os_reason(error)}."
        ) from error


def _rows_of_parquet(path: Path, columns: list[str]) -> Iterator[Mapping[str, Any]]:
    # A file that cannot be opened is told in the system's words, not in Arrow's.
    open(path, "rb").close()
    with _arrow_told(path, "Parquet"), pq.ParquetFile(path) as file:
        wanted = _wanted(file.schema_arrow.names, columns, path)
        for batch in file.iter_batches(columns=wanted):
            yield from _rows_of_batch(batch)


@contextmanager
def _arrow_told(path: Path, kind: str) -> Iterator[None]:
    """Arrow's complaints about what a file holds, which may be an OSError without a number."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise PivotTraceError(
            f"{path} is not a readable {kind} file: {arrow_reason(error)}."
        ) from error


def _rows_of_batch(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    # Text that is not UTF-8 would fail only where it is used.
    batch.validate(full=True)
    rows: list[dict[str, Any]] = batch.to_pylist()
    return rows


def _wanted(names: list[str], columns: list[str], path: Path) -> list[str]:
    """Those of `columns` that are there; PivotTraceError without prompts or with one twice."""
    for name in columns:
        if names.count(name) > 1:
            raise PivotTraceError(f"{path} has the column '{name}' twice.")
    if "prompt" not in names:
        raise PivotTraceError(
            f"{path} has no column 'prompt', only {', '.join(sorted(names)) or 'no columns'}."
        )
    return [name for name in columns if name in names]


def _rows_of_jsonl(path: Path, columns: list[str]) -> Iterator[Mapping[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                # Some editors put a byte order mark in front of a file.
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise PivotTraceError(
                    f"Line {number} of {path} is not UTF-8 text: {error.reason}."
                ) from error
            except (ValueError, RecursionError) as error:
                raise PivotTraceError(
                    f"Line {number} of {path} is not JSON: {json_reason(error)}."
                ) from error
            if not isinstance(row, dict) or "prompt" not in row:
                raise PivotTraceError(f"Line {number} of {path} has no field 'prompt'.")
            yield {name: row[name] for name in columns if name in row}


def _rows_of_folder(path: Path, columns: list[str]) -> Iterator[Mapping[str, Any]]:
    if not (path / "state.json").exists():
        raise PivotTraceError(f"{path} is a folder, but not one written by datasets.save_to_disk.")
    for file in _data_files(path / "state.json"):
        if file.stat().st_size == 0:
            raise PivotTraceError(f"{file} is not a readable Arrow file: it is empty.")
        with _arrow_told(file, "Arrow"), pa.memory_map(str(file)) as source:
            names = pa.ipc.open_stream(source).schema.names
            wanted = [names.index(name) for name in _wanted(names, columns, path)]
            source.seek(0)
            options = pa.ipc.IpcReadOptions(included_fields=wanted)
            for batch in pa.ipc.open_stream(source, options=options):
                yield from _rows_of_batch(batch)


def _data_files(state: Path) -> list[Path]:
    """The data files that a saved data set's state names, all of them in its own folder."""
    content = read_json(state)
    listed = content.get("_data_files") if isinstance(content, dict) else None
    names: list[str] = []
    for data in listed if isinstance(listed, list) else [None]:
        name = data.get("filename") if isinstance(data, dict) else None
        if not isinstance(name, str):
            raise PivotTraceError(f"{state} does not list the data files of a saved data set.")
        if Path(name).name != name:
            raise PivotTraceError(
                f"{state} names the data file '{name}', which is not in its own folder."
            )
        names.append(name)
    return [state.parent / name for name in names]
