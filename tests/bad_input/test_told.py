"""Odd input that is taken, and said to be."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from bad_world import CHAT, INIT, N, call, good, ids, jsonl, snapshot

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.pool import RunDir
from pivottrace_verl.prompts import read_pool


def test_duplicates_are_merged_and_counted_aloud(world: Path) -> None:
    rows = (world / "pool.jsonl").read_text()
    (world / "twice.jsonl").write_text(rows + rows)
    said = good(INIT % "twice.jsonl", world).out
    assert f"{N} distinct prompts ({N} duplicates merged)" in said
    assert ids(world) == [prompt.pt_id for prompt in RunDir.open(world / "new").pool()]


def test_a_byte_order_mark_changes_no_prompt(world: Path) -> None:
    (world / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + (world / "pool.jsonl").read_bytes())
    good(INIT % "bom.jsonl", world)
    assert ids(world) == [prompt.pt_id for prompt in RunDir.open(world / "new").pool()]


def test_columns_of_other_people_named_like_ours_are_not_taken_for_ours(world: Path) -> None:
    row = {
        "prompt": CHAT,
        "pt_id": "theirs",
        "label": "nonsense",
        "route": 7,
        "uncertainty": float("nan"),
        "extra_info": ["theirs"],
        "reward_model": {"ground_truth": "nonsense"},
    }
    jsonl(world / "theirs.jsonl", [row])
    pq.write_table(pa.Table.from_pylist([row]), world / "theirs.parquet")
    jsonl(world / "bare.jsonl", [{"prompt": CHAT}])
    prompts = read_pool(world / "bare.jsonl").prompts
    for name in ("theirs.jsonl", "theirs.parquet"):
        assert read_pool(world / name).prompts == prompts
    good(INIT % "theirs.jsonl", world)
    for file in (world / "new").iterdir():
        assert b"nonsense" not in file.read_bytes() and b'theirs"' not in file.read_bytes()


def test_huge_ids_and_other_scripts_are_only_text(world: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "\0\u2028\U0001f600" * 1000}]}
    jsonl(world / "odd.jsonl", [{**row, "data_source": "x" * 1_000_000, "id": "9" * 4000}])
    good(INIT % "odd.jsonl", world)
    (prompt,) = RunDir.open(world / "new").pool()
    assert len(prompt.pt_id) == 16 and len(prompt.data_source) == 1_000_000


def test_paths_that_are_not_utf8_are_paths_like_others(world: Path) -> None:
    """Every system call takes them; only text files have to spell them in another way."""
    odd = os.fsdecode(b"odd\xff.")
    (world / "pool.jsonl").rename(world / f"{odd}jsonl")
    (world / "labels.csv").rename(world / f"{odd}csv")
    good(INIT % f"{odd}jsonl", world)
    assert RunDir.open(world / "new").manifest["pool"]["source"].endswith(f"{odd}jsonl")
    good(f"annotate import {{w}}/run {{w}}/{odd}csv", world)
    assert RunDir.open(world / "run").ledger().entries()[-1]["source_file"].endswith(f"{odd}csv")
    good("triage {w}/run --budget 30", world)
    good("report {w}/run", world)


@pytest.mark.parametrize(
    ("field", "value"),
    [("cost", -1.0), ("cost", float("nan")), ("label", 7), ("annotator", None), ("purpose", "x")],
)
def test_what_a_ledger_would_not_read_back_is_not_added(
    field: str, value: object, world: Path
) -> None:
    run = RunDir.open(world / "run")
    entry = {**run.ledger().entries()[0], "pt_id": "new", field: value}
    before = snapshot(world)
    with pytest.raises(PivotTraceError, match=f"{field} is"):
        run.ledger().append([entry])
    assert snapshot(world) == before


def test_a_window_longer_than_the_rollouts_look_back_is_told(world: Path) -> None:
    run = RunDir.open(world / "run")
    run.update_manifest(detector={**run.manifest["detector"], "tau": 0.0})
    ran = call("score {w}/run --part-size 16", world)
    assert ran.status == 0, ran.err
    assert ran.err.startswith("warning: tau is 0") and "--window" in ran.err, ran.err
    run.update_manifest(detector={**run.manifest["detector"], "tau": 0.1})
    assert not call("score {w}/run --part-size 16", world).err


def test_a_torn_ledger_line_is_told_once_and_left_in_place(world: Path) -> None:
    ledger = world / "run" / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:-20])
    before = ledger.read_bytes()
    ran = call("report {w}/run", world)
    assert ran.status == 0
    assert ran.err.startswith("warning: ") and ran.err.count("\n") == 1, ran.err
    assert "1 incomplete line" in ran.err and "line 20" in ran.err
    assert ledger.read_bytes() == before


def test_a_conflict_with_a_bought_label_is_told_and_the_bought_one_stands(world: Path) -> None:
    bought = RunDir.open(world / "run").ledger().labels()
    pt_id = next(iter(bought))
    (world / "other.csv").write_text(f"pt_id,label\n{pt_id},12345\n")
    before = snapshot(world)
    said = good("annotate import {w}/run {w}/other.csv", world).out
    assert f"{pt_id} has '{bought[pt_id]}', the file says '12345'" in said
    after = snapshot(world)
    assert after.pop("run/conflicts.json")
    assert after == before


def test_a_message_about_something_huge_is_cut_in_the_middle(world: Path) -> None:
    ran = call(f"annotate import {{w}}/run {{w}}/{'d' * 5000}.csv", world)
    assert ran.status == 2 and len(ran.err) < 1700 and ran.err.endswith(": file name too long.\n")


def test_a_prompt_cannot_drive_the_terminal(world: Path) -> None:
    """What quotes a file shows control characters as their escapes, on both streams."""
    bought = next(iter(RunDir.open(world / "run").ledger().labels()))
    (world / "run" / "scores").rename(world / "run" / "kept")
    jsonl(world / "l.jsonl", [{"pt_id": bought, "label": "1 +\r\x0b 1"}])
    said = good("annotate import {w}/run {w}/l.jsonl", world).out
    assert "\\r\\x0b" in said and "\r" not in said
    jsonl(world / "l.jsonl", [{"pt_id": bought + "\x1b]0;owned\x07", "label": "1"}])
    ran = call("annotate import {w}/run {w}/l.jsonl", world)
    assert ran.status == 2 and "\x1b" not in ran.err and "\\x1b" in ran.err


def test_json_output_is_only_json(world: Path) -> None:
    ran = good("triage {w}/run --dry-run --json", world)
    assert json.loads(ran.out)["routes"] and not ran.err
