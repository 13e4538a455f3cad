"""Bad pools, models and validation data: what `init` is given."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from bad_world import CHAT, INIT, Case, jsonl

ROW = {"prompt": CHAT, "data_source": "sums"}
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])


def with_bytes(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda w: (w / name).write_bytes(content)


def a_pool(name: str, file: str, content: bytes, says: str) -> Case:
    return Case(name, INIT % file, says, with_bytes(file, content))


def rows_pool(name: str, rows: list[Any], says: str) -> Case:
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return a_pool(name, "bad.jsonl", lines, says)


def parquet(name: str, columns: dict[str, Any], says: str) -> Case:
    def arrange(w: Path) -> None:
        pq.write_table(pa.table(columns), w / "bad.parquet")

    return Case(name, INIT % "bad.parquet", says, arrange)


def not_text() -> pa.Array:
    """A chat whose content is text by its type, but not valid UTF-8."""
    raw = pa.array([b"\xff\xfe broken"], pa.binary()).view(pa.string())
    message = pa.StructArray.from_arrays([pa.array(["user"]), raw], fields=list(MESSAGE))
    return pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), message)


def _truncated_parquet(w: Path) -> None:
    pq.write_table(pa.Table.from_pylist([ROW] * 50), w / "bad.parquet")
    content = (w / "bad.parquet").read_bytes()
    (w / "bad.parquet").write_bytes(content[: len(content) // 2])


def _damaged_parquet(w: Path) -> None:
    """Whole footer, but the data pages are noise."""
    rows = [{"prompt": [{"role": "user", "content": f"{i} {i}"}]} for i in range(500)]
    pq.write_table(pa.Table.from_pylist(rows), w / "bad.parquet", compression="zstd")
    content = bytearray((w / "bad.parquet").read_bytes())
    content[40:400] = b"\xa5" * 360
    (w / "bad.parquet").write_bytes(content)


def _twice_the_column(w: Path) -> None:
    prompt = pa.array([CHAT], pa.list_(MESSAGE))
    table = pa.Table.from_arrays([prompt, prompt], names=["prompt", "prompt"])
    pq.write_table(table, w / "bad.parquet")


def a_folder(state: Any, data: bytes | None = None) -> Callable[[Path], object]:
    def arrange(w: Path) -> None:
        (w / "folder").mkdir()
        if state is not None:
            (w / "folder" / "state.json").write_text(json.dumps(state))
        if data is not None:
            (w / "folder" / "data-00000-of-00001.arrow").write_bytes(data)

    return arrange


def saved(rows: list[Any]) -> bytes:
    table = pa.Table.from_pylist(rows)
    with pa.BufferOutputStream() as sink:
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        return bytes(sink.getvalue())


STATE = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}


def folder(name: str, says: str, state: Any, data: bytes | None = None) -> Case:
    return Case(name, INIT % "folder", says, a_folder(state, data))


class Bomb:
    """Unpickled, it leaves a file."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("unpickled",))


PICKLE = pickle.dumps(Bomb())

POOLS = [
    a_pool("empty file", "bad.jsonl", b"", r"bad\.jsonl holds no prompts"),
    a_pool("blank lines", "bad.jsonl", b"\n \n", r"bad\.jsonl holds no prompts"),
    rows_pool("prompt is text", [{"prompt": "1 + 1?"}], r"row 1 of .*bad\.jsonl.* is text, but"),
    rows_pool(
        "prompt is null", [ROW, {"prompt": None}], r"row 2 of .*bad\.jsonl .* is missing, but"
    ),
    rows_pool("prompt is an empty list", [{"prompt": []}], "row 1 .* is an empty list, but"),
    rows_pool("prompt is a number", [{"prompt": 7}], "row 1 .* is a number, but"),
    rows_pool("message is null", [{"prompt": [None]}], "row 1 .* role and content"),
    rows_pool("message without a role", [{"prompt": [{"content": "q"}]}], "role and content"),
    rows_pool(
        "content is null",
        [{"prompt": [{"role": "user", "content": None}]}],
        "row 1 .* role and content",
    ),
    rows_pool(
        "message with an image",
        [{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}],
        "row 1 .* role and content",
    ),
    rows_pool(
        "message with tool calls",
        [{"prompt": [{"role": "user", "content": "q", "tool_calls": [1]}]}],
        "row 1 .* tool_calls",
    ),
    rows_pool(
        "data source is a number", [{"prompt": CHAT, "data_source": 3}], "row 1 .* is a number, but"
    ),
    rows_pool("row is a list", [[1]], r"Line 1 of .*bad\.jsonl has no field 'prompt'"),
    rows_pool("row without a prompt", [{"question": "q"}], r"Line 1 .* no field 'prompt'"),
    a_pool("torn line", "bad.jsonl", b'{"prompt": [{"ro', r"Line 1 of .*bad\.jsonl is not JSON"),
    a_pool(
        "broken UTF-8",
        "bad.jsonl",
        b'{"prompt": [{"role": "user", "content": "\xe9\xff"}]}\n',
        r"Line 1 of .*bad\.jsonl is not UTF-8 text",
    ),
    a_pool("NUL bytes", "bad.jsonl", b"\0" * 4096, r"Line 1 of .*bad\.jsonl is not JSON"),
    a_pool(
        "UTF-16", "bad.jsonl", json.dumps(ROW).encode("utf-16"), r"Line 1 of .* is not UTF-8 text"
    ),
    a_pool(
        "nested too deep", "bad.jsonl", b"[" * 100_000, r"Line 1 of .*: it is nested too deeply"
    ),
    a_pool(
        "a number without end",
        "bad.jsonl",
        b'{"prompt": 1' + b"0" * 100_000 + b"}\n",
        r"Line 1 of .*bad\.jsonl is not JSON: it holds a number of more than 4300 digits",
    ),
    a_pool("bare NaN", "bad.jsonl", b'{"prompt": NaN}\n', r"row 1 of .*bad\.jsonl is not a chat"),
    rows_pool(
        "half a surrogate pair",
        [{"prompt": [{"role": "user", "content": "\ud800"}]}],
        "row 1 .* not valid Unicode",
    ),
    a_pool("noise as Parquet", "bad.parquet", b"no parquet at all", r"bad\.parquet .*Parquet"),
    a_pool("empty Parquet file", "bad.parquet", b"", r"bad\.parquet .*Parquet"),
    Case("truncated Parquet", INIT % "bad.parquet", r"bad\.parquet .*Parquet", _truncated_parquet),
    Case("damaged Parquet", INIT % "bad.parquet", r"bad\.parquet .*Parquet", _damaged_parquet),
    Case("Parquet, a column twice", INIT % "bad.parquet", "'prompt' twice", _twice_the_column),
    parquet("Parquet without prompts", {"question": ["q"]}, "no column 'prompt', only question"),
    parquet("Parquet of strings", {"prompt": ["q"]}, r"row 1 of .*bad\.parquet .* is text, but"),
    parquet("Parquet of nulls", {"prompt": pa.nulls(3)}, r"row 1 of .*bad\.parquet is not a chat"),
    parquet(
        "Parquet without rows",
        {"prompt": pa.array([], pa.list_(MESSAGE))},
        r"bad\.parquet holds no prompts",
    ),
    parquet(
        "Parquet with a null message",
        {"prompt": pa.array([[None]], pa.list_(MESSAGE))},
        r"row 1 of .*bad\.parquet .* role and content",
    ),
    parquet("Parquet, broken UTF-8", {"prompt": not_text()}, r"bad\.parquet .*not UTF-8"),
    a_pool("spreadsheet", "bad.xlsx", b"PK", r"bad\.xlsx is neither"),
    a_pool("pickle", "bad.pkl", PICKLE, r"bad\.pkl is neither"),
    a_pool("pickle called JSONL", "bad.jsonl", PICKLE, r"Line 1 of .*bad\.jsonl is not UTF-8"),
    a_pool("pickle called Parquet", "bad.parquet", PICKLE, r"bad\.parquet .*Parquet"),
    Case("no such file", INIT % "none.jsonl", r"none\.jsonl cannot be read: no such file"),
    Case(
        "a folder called JSONL",
        INIT % "dir.jsonl",
        r"dir\.jsonl is a folder, but not one written by datasets",
        lambda w: (w / "dir.jsonl").mkdir(),
    ),
    Case(
        "links in a circle",
        INIT % "loop.jsonl",
        r"loop\.jsonl cannot be read: too many levels of symbolic links",
        lambda w: (w / "loop.jsonl").symlink_to("loop.jsonl"),
    ),
    Case("a path too long", INIT % ("x" * 300 + ".jsonl"), r"xxx\.jsonl.*: file name too long"),
    folder("folder that is no data set", r"folder is a folder, but not one written", None),
    folder("data set without its data", r"data-00000-of-00001\.arrow.* no such file", STATE),
    folder(
        "data set, data half written",
        r"data-00000-of-00001\.arrow .*Arrow",
        STATE,
        saved([ROW] * 50)[:-700],
    ),
    folder("data set, data empty", r"data-00000-of-00001\.arrow .*Arrow", STATE, b""),
    folder("data set, state of others", r"state\.json .*data files", {"files": 1}),
    folder("data set, state a list", r"state\.json .*data files", [1]),
    folder(
        "data set that points elsewhere",
        r"state\.json names the data file '\.\./",
        {"_data_files": [{"filename": "../folder/data-00000-of-00001.arrow"}]},
        saved([ROW]),
    ),
    folder("data set without prompts", "no column 'prompt'", STATE, saved([{"question": "q"}])),
]

NEW = "init {w}/new --pool {w}/pool.jsonl --answers expression "


def _without(name: str) -> Callable[[Path], object]:
    return lambda w: (w / "model" / name).unlink()


MODELS = [
    Case("no such model", NEW + "--model {w}/nowhere", r"nowhere.*: no such file"),
    Case(
        "model without config",
        NEW + "--model {w}/model",
        r"model.*config\.json: no such file",
        _without("config.json"),
    ),
    Case(
        "model without weights",
        NEW + "--model {w}/model",
        "model is not a model folder: it holds no weight file",
        _without("model.safetensors"),
    ),
    Case("model is a file", NEW + "--model {w}/pool.jsonl", r"pool\.jsonl.*: not a directory"),
    Case(
        "weights are a folder",
        NEW + "--model {w}/model",
        r"more\.safetensors: is a directory",
        lambda w: (w / "model" / "more.safetensors").mkdir(),
    ),
    Case(
        "unknown answers kind",
        "init {w}/new --pool {w}/pool.jsonl --model {w}/model --answers poems",
        "answers kind 'poems' is neither",
    ),
    Case(
        "answers kind that is no module",
        "init {w}/new --pool {w}/pool.jsonl --model {w}/model --answers no.such:thing",
        "answers kind 'no.such:thing' cannot be made: No module named 'no'",
    ),
    Case(
        "init: run directory is a file",
        "init {w}/pool.jsonl --pool {w}/pool.jsonl --model {w}/model",
        r"pool\.jsonl cannot be made: file exists",
    ),
]

VAL = INIT % "pool.jsonl" + " --val {w}/bad.jsonl"
LABELLED = {"prompt": CHAT, "label": "2"}


def validation(name: str, rows: list[Any], says: str) -> Case:
    return Case(name, VAL, says, lambda w: jsonl(w / "bad.jsonl", rows))


VALIDATION = [
    validation("validation without labels", [{"prompt": CHAT}], r"row 1 of .*bad.* has no label"),
    validation("validation, label empty", [{**LABELLED, "label": " "}], "row 1 .* has no label"),
    validation("validation, label a list", [{**LABELLED, "label": ["2"]}], "row 1 .* is a list"),
    validation("validation, label NaN", [{**LABELLED, "label": float("nan")}], "row 1 .* nan"),
    validation(
        "validation, label half a surrogate pair",
        [{**LABELLED, "label": "\ud800"}],
        "row 1 .* not valid Unicode",
    ),
    validation("validation, truth null", [{"prompt": CHAT, "reward_model": {"ground_truth": None}}],
               "row 1 .* has no label"),
    validation(
        "validation, two labels for a prompt",
        [LABELLED, {**LABELLED, "label": "3"}],
        "row 2 .* label '3', but an earlier row has '2'",
    ),
    validation("validation, empty", [], "holds no validation prompts"),
]  # fmt: skip

CASES = [*POOLS, *MODELS, *VALIDATION]
