"""Files: written whole or not at all, read with a sentence when they cannot be.

Contract: a reader never sees half a file. Content goes to a temporary file in the same folder,
is synced and renamed; if anything fails (no space left, say) the temporary file goes and the old
file stays. Fingerprints are the first 16 hex digits of a SHA-256.
"""

import errno
import glob
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pivottrace_verl.errors import PivotTraceError

ROW_GROUP = 1 << 16
"""Rows of a row group of a table that is written piece by piece."""


def os_reason(error: OSError) -> str:
    """Why the system refused, in words a user can act on."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "no space is left on the device"
    return (error.strerror or first_line(error)).lower()


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # A folder in the place of the file would be told only after all is written.
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # The folder itself may be what failed: then there is nothing to remove.
        with suppress(OSError):
            temporary.unlink()
        raise PivotTraceError(
            f"{path} cannot be written: {os_reason(error)}; nothing was changed."
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes_atomic(path: Path, content: bytes) -> None:
    """Replace `path` by `content`. PivotTraceError if that fails; `path` is then as it was."""
    with _replacing(path) as file:
        file.write(content)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Remove the temporary files that killed processes left of writing `folder/name`."""
    pattern = name if name == "*" else glob.escape(name)
    for path in folder.glob(f".{pattern}.*.tmp"):
        found = re.fullmatch(r"\..+\.(\d+)\.tmp", path.name)
        if found and not _alive(int(found[1])):
            with suppress(OSError):
                path.unlink()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def write_json_atomic(path: Path, content: Any) -> None:
    """JSON, keys sorted, one trailing newline. NaN and infinity raise ValueError: a reader of
    another language could not take them."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    # A path that is not UTF-8 holds lone surrogates: their escape is JSON's own.
    write_bytes_atomic(path, (text + "\n").encode(errors="backslashreplace"))


def write_table_atomic(path: Path, table: pa.Table) -> None:
    """Parquet. Equal tables give equal bytes."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_bytes_atomic(path, buffer.getvalue())


def write_tables_atomic(
    path: Path, tables: Iterable[pa.Table], metadata: Mapping[bytes, str]
) -> None:
    """Parquet from tables of one schema, held in memory a row group at a time. However the rows
    are cut into tables, equal rows give equal bytes. ValueError if there is no table."""
    with _replacing(path) as file, ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        rest: pa.Table | None = None
        for table in tables:
            if writer is None:
                schema = table.schema.with_metadata(metadata)
                writer = stack.enter_context(pq.ParquetWriter(file, schema, compression="zstd"))
            rest = table if rest is None else pa.concat_tables([rest, table])
            while rest.num_rows >= ROW_GROUP:
                writer.write_table(rest.slice(0, ROW_GROUP).combine_chunks())
                rest = rest.slice(ROW_GROUP)
        if writer is None or rest is None:
            raise ValueError(f"nothing to write to {path}")
        if rest.num_rows:
            writer.write_table(rest.combine_chunks())


def read_json(path: Path) -> Any:
    """A JSON file; PivotTraceError if it is missing, unreadable or no JSON."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise PivotTraceError(f"{path} cannot be read: {os_reason(error)}.") from error
    except (ValueError, RecursionError) as error:
        raise PivotTraceError(f"{path} is not a JSON file: {json_reason(error)}.") from error


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object; PivotTraceError if it does not."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise PivotTraceError(f"{path} does not hold one JSON object.")
    return content


def read_schema(path: Path) -> pa.Schema:
    """The columns of a Parquet file and what it says of itself; PivotTraceError if missing or
    unreadable."""
    with _parquet_told(path):
        return pq.read_schema(path)


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file, only `columns` of it; PivotTraceError if missing or unreadable."""
    with _parquet_told(path):
        table = pq.read_table(path, columns=columns, partitioning=None)
        # Text that is not UTF-8 would fail only where it is used.
        table.validate(full=True)
        return table


@contextmanager
def _parquet_told(path: Path) -> Iterator[None]:
    """What goes wrong in reading a Parquet file, as a sentence that names it."""
    try:
        # A file that cannot be opened is told in the system's words, not in Arrow's.
        open(path, "rb").close()
        yield
    except OSError as error:
        # What is wrong inside a file, Arrow tells as OSError without a number.
        if error.errno is None:
            raise PivotTraceError(
                f"{path} is not a readable Parquet file: {arrow_reason(error)}."
            ) from error
        raise PivotTraceError(f"{path} cannot be read: {os_reason(error)}.") from error
    except pa.ArrowException as error:
        raise PivotTraceError(
            f"{path} is not a readable Parquet file: {arrow_reason(error)}."
        ) from error


def json_reason(error: ValueError | RecursionError) -> str:
    """Why text is no JSON, and where, as half a sentence."""
    match error:
        case json.JSONDecodeError():
            line = f"line {error.lineno}, " if error.lineno > 1 else ""
            return f"{error.msg.removesuffix(' starting at').lower()} at {line}column {error.colno}"
        case UnicodeDecodeError():
            return f"it is not UTF-8 text ({error.reason})"
        case RecursionError():
            return "it is nested too deeply"
    # The one other thing the parser refuses.
    return f"it holds a number of more than {sys.get_int_max_str_digits()} digits"


def arrow_reason(error: Exception) -> str:
    """What Arrow says of a file it cannot read, as half a sentence."""
    text = first_line(error)
    if "UTF8" in text:
        return "it holds text that is not UTF-8"
    return re.sub(r"^Could not open Parquet input source '.*': ", "", text).split(". ")[0]


def first_line(error: Exception) -> str:
    """The first line of a library's message, without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def fingerprint(content: Any) -> str:
    """Of JSON-able content, in canonical form; lone surrogates raise UnicodeEncodeError."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_fingerprint(path: Path) -> str:
    """Of a file's bytes; PivotTraceError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise PivotTraceError(f"{path} cannot be read: {os_reason(error)}.") from error


_ENDS = 1 << 20


def model_fingerprint(path: Path) -> str:
    """Of a Hugging Face model folder: config.json, and of each weight file the name, the size,
    the first and the last MiB. PivotTraceError if the folder is no such model."""
    weights = sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
    try:
        digest = hashlib.sha256((path / "config.json").read_bytes())
        for weight in weights:
            size = weight.stat().st_size
            digest.update(f"\0{weight.name}\0{size}\0".encode())
            with open(weight, "rb") as file:
                digest.update(file.read(_ENDS))
                file.seek(max(0, size - _ENDS))
                digest.update(file.read(_ENDS))
    except OSError as error:
        raise PivotTraceError(
            f"{path} is not a readable model folder: {error.filename or path}: {os_reason(error)}."
        ) from error
    if not weights:
        raise PivotTraceError(f"{path} is not a model folder: it holds no weight file.")
    return digest.hexdigest()[:16]
