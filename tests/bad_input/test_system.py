"""What the system refuses: a full disk, missing permission, another process on the directory."""

import fcntl
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import bad_world
import pytest
from bad_forks import Forks
from bad_world import INIT, check_sentence, snapshot, words

from pivottrace_verl.annotation import export_queue
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.pool import RunDir

WRITES = [
    f"{INIT} --val {{w}}/val.jsonl" % "pool.jsonl",
    "probe {w}/run --n 12",
    "triage {w}/run --budget 25",
    "annotate import {w}/run {w}/labels.csv",
    "annotate export {w}/run {w}/q.csv",
    "annotate fill {w}/queue.csv {w}/out.csv --answers {w}/labels.csv",
    "report {w}/run",
]
VERB = [command.split(" {w}")[0] for command in WRITES]


def without_new(found: dict[str, tuple[int, bytes | None]]) -> dict[str, tuple[int, bytes | None]]:
    """A run that could not be made may leave its folder, which is no run yet."""
    return {name: entry for name, entry in found.items() if not name.startswith("new")}


@pytest.mark.parametrize("command", WRITES, ids=VERB)
def test_a_disk_that_fills_up_leaves_every_file_as_it_was(
    command: str, world: Path, forks: Forks
) -> None:
    """The kernel stops a file at a size, as it does on a full disk: any user can have that."""
    before = without_new(snapshot(world))
    for size in (5, 100):
        status, _, err, _ = forks.run(words(command, world), largest_file=size)
        assert status == 2, (size, err)
        assert "file too large" in check_sentence(err)
        assert without_new(snapshot(world)) == before, size
        assert not list(world.rglob("*.tmp"))


@pytest.fixture
def small_disk(made_once: Path, tmp_path: Path) -> Iterator[Path]:
    """A world on a file system of its own, filled to the last byte."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if shutil.which("mount") is None or subprocess.call(command, stderr=-3):
        pytest.skip("a file system cannot be mounted here: that takes privileges")
    try:
        yield bad_world.copy(made_once, mount / "w")
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_leaves_every_file_as_it_was(small_disk: Path, forks: Forks) -> None:
    with open(small_disk.parent / "filler", "wb", buffering=0) as file:
        for chunk in (4096, 1):
            while True:
                try:
                    file.write(bytes(chunk))
                except OSError:
                    break
    before = without_new(snapshot(small_disk))
    for command in WRITES:
        status, _, err, _ = forks.run(words(command, small_disk))
        assert status == 2, command
        assert "no space is left on the device" in check_sentence(err), command
        assert without_new(snapshot(small_disk)) == before, command


def test_a_full_disk_under_each_write_of_a_run_directory(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir.open(world / "run")
    rows = run.scores().to_pylist()
    plan = run.plan().to_pylist()
    before = snapshot(world)
    full = OSError(28, os.strerror(28))
    writes = [
        lambda: run.update_manifest(seed=1),
        lambda: run.write_score_part(0, rows[:1]),
        lambda: run.write_score_part(7, rows[:1]),
        run.merge_scores,
        lambda: run.write_probes("entropy", 0, []),
        lambda: run.write_plan(plan, {}),
        lambda: export_queue(run, [rows[0]["pt_id"]], world / "q.csv"),
    ]
    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, lambda *_: (_ for _ in ()).throw(full))
            for write in writes:
                with pytest.raises(PivotTraceError, match="no space is left"):
                    write()
                assert snapshot(world) == before


# Another process


@pytest.mark.parametrize("command", WRITES[1:5] + WRITES[6:], ids=VERB[1:5] + VERB[6:])
def test_a_run_directory_in_use_is_refused_by_every_verb(
    command: str, world: Path, forks: Forks
) -> None:
    before = snapshot(world)
    with RunDir.open(world / "run").lock():
        status, _, err, _ = forks.run(words(command, world))
    assert status == 2
    assert f"Another process (pid {os.getpid()}) is working on" in check_sentence(err)
    assert snapshot(world) == before


def test_a_directory_that_is_being_made_is_refused(world: Path, forks: Forks) -> None:
    (world / "new").mkdir()
    with open(world / "new" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        status, _, err, _ = forks.run(words(INIT % "pool.jsonl", world))
    assert status == 2 and "is working on" in check_sentence(err)
    assert [path.name for path in (world / "new").iterdir()] == [".lock"]


def test_of_two_imports_at_once_none_buys_twice(world: Path, forks: Forks) -> None:
    """Two real processes, started together: each label is in the ledger once."""
    command = words("annotate import {w}/run {w}/labels.csv", world)
    ran: list[tuple[int, str, str]] = []

    def run(program: Forks) -> None:
        status, out, err, _ = program.run(command)
        ran.append((status, out, err))

    with Forks() as other:
        other.run(["--help"])
        threads = [threading.Thread(target=run, args=[program]) for program in (forks, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for status, _, err in ran:
        assert status == 0 or "is working on" in check_sentence(err)
    assert 0 in [status for status, _, _ in ran]
    entries = RunDir.open(world / "run").ledger().entries()
    assert len(entries) == len({entry["pt_id"] for entry in entries}) == 40


# Permission


def denied(forks: Forks, command: str, w: Path) -> str:
    before = snapshot(w)
    status, _, err, _ = forks.run(words(command, w), powerless=True)
    assert status == 2, err
    assert snapshot(w) == before
    return check_sentence(err)


@pytest.mark.parametrize("command", WRITES[:3] + WRITES[4:], ids=VERB[:3] + VERB[4:])
def test_a_directory_without_permission_is_refused(command: str, world: Path, forks: Forks) -> None:
    for path in (world, world / "run"):
        path.chmod(0o555)
    try:
        assert "permission denied" in denied(forks, command, world)
        (world / "run" / ".lock").chmod(0o444)
        assert "permission denied" in denied(forks, command, world)
    finally:
        for path in (world, world / "run"):
            path.chmod(0o755)


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("pool.jsonl", INIT % "pool.jsonl"),
        ("model/config.json", INIT % "pool.jsonl"),
        ("labels.csv", "annotate import {w}/run {w}/labels.csv"),
        ("run/ledger.jsonl", "triage {w}/run"),
        ("run/manifest.json", "triage {w}/run"),
        ("run/scores.parquet", "probe {w}/run"),
    ],
)
def test_a_file_that_may_not_be_read_is_named(
    name: str, command: str, world: Path, forks: Forks
) -> None:
    (world / name).chmod(0)
    status, _, err, _ = forks.run(words(command, world), powerless=True)
    assert status == 2, err
    said = rf"{re.escape(str(world / name))}.*(permission denied|is not readable)"
    assert re.search(said, check_sentence(err))


def test_a_folder_that_may_not_be_entered_is_named(world: Path, forks: Forks) -> None:
    (world / "run").chmod(0)
    try:
        status, _, err, _ = forks.run(words("triage {w}/run", world), powerless=True)
    finally:
        (world / "run").chmod(0o755)
    assert status == 2
    assert re.search("/run.* (permission denied|is not readable)", check_sentence(err))


def test_a_ledger_that_may_not_be_written_takes_no_label(world: Path, forks: Forks) -> None:
    (world / "run" / "ledger.jsonl").chmod(0o444)
    said = denied(forks, "annotate import {w}/run {w}/labels.csv", world)
    assert re.search(r"ledger\.jsonl cannot be written: permission denied; no label was", said)
