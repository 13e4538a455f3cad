"""SIGKILL at any moment: what was valid stays valid, and the same command then ends the same."""

import io
import json
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from bad_forks import Forks
from bad_world import INIT, check_sentence, good, ids, snapshot, words, write_scores

from pivottrace_verl.pool import RunDir

Snapshot = dict[str, tuple[int, bytes | None]]


def with_run_of(*later: str) -> Callable[[Path], None]:
    """Take away what the verb and those after it have made."""

    def arrange(w: Path) -> None:
        for name in later:
            path = w / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return arrange


PLAN = ("run/plan.parquet", "run/triage.json", "queue.csv")
PROBES = (*PLAN, "run/probes.json", "run/ledger.jsonl", "probes.csv", "filled.csv")

VERBS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "init": (f"{INIT} --val {{w}}/val.jsonl" % "pool.jsonl", lambda w: None),
    "score, last merge": (
        "score {w}/run --part-size 16",
        with_run_of("run/scores.parquet", *PROBES),
    ),
    "probe": ("probe {w}/run --n 20", with_run_of(*PROBES)),
    "probe, other probes before": ("probe {w}/run --n 12", with_run_of(*PLAN)),
    "import": ("annotate import {w}/run {w}/filled.csv", with_run_of(*PLAN, "run/ledger.jsonl")),
    "import, labels before": ("annotate import {w}/run {w}/labels.csv", lambda w: None),
    "triage": ("triage {w}/run --budget 30", with_run_of(*PLAN)),
    "triage, another plan before": ("triage {w}/run --budget 25", lambda w: None),
    "export": ("annotate export {w}/run {w}/new/q.csv", lambda w: None),
    "export, a queue before": ("annotate export {w}/run {w}/queue.csv --what probes",
                               with_run_of("run/ledger.jsonl")),
    "fill": ("annotate fill {w}/queue.csv {w}/out.jsonl --answers {w}/labels.csv", lambda w: None),
}  # fmt: skip


def timeless(found: Snapshot) -> Snapshot:
    """Without what has to differ: when a label was bought, how long a stage took."""
    when = re.compile(rb'("time"|"timings"): ("[^"]*"|\{[^}]*\})')
    return {
        name: (mode, content and when.sub(rb"\1: 0", content))
        for name, (mode, content) in found.items()
    }


def check_readable(name: str, content: bytes) -> None:
    if name.endswith(".parquet"):
        pq.read_table(io.BytesIO(content))
    elif name.endswith(".json"):
        json.loads(content)
    elif name.endswith(".jsonl"):
        assert content.endswith(b"\n") or not content
        for line in content.splitlines():
            json.loads(line)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_killed_at_any_write_can_be_run_again_and_ends_the_same(
    verb: str, world: Path, tmp_path: Path, forks: Forks
) -> None:
    command, arrange = VERBS[verb]
    arrange(world)
    start = tmp_path / "start"
    shutil.copytree(world, start)
    before = timeless(snapshot(world))
    status, _, err, steps = forks.run(words(command, world))
    assert status == 0 and not err, err
    assert steps >= 2
    after = timeless(snapshot(world))
    assert after != before

    for step in range(steps):
        shutil.rmtree(world)
        shutil.copytree(start, world)
        status, *_ = forks.run(words(command, world), die_at=step)
        assert status == -signal.SIGKILL
        for name, (_, content) in (found := timeless(snapshot(world))).items():
            if content is None or name.endswith(".tmp"):
                continue
            whole = [side[name][1] for side in (before, after) if name in side]
            assert content in whole or name.endswith(("manifest.json", ".jsonl")), (step, name)
            check_readable(name, content)
        assert before.keys() <= found.keys(), step
        status, _, err, _ = forks.run(words(command, world))
        assert status == 0 and not err, (step, err)
        assert timeless(snapshot(world)) == after, step


@pytest.mark.parametrize("verb", ["init", "import", "triage, another plan before", "export"])
def test_a_verb_interrupted_at_any_write_says_so_and_leaves_nothing_half_written(
    verb: str, new_world: Callable[[str], Path], forks: Forks
) -> None:
    command, arrange = VERBS[verb]
    for step in range(20):
        arrange(world := new_world(f"w{step}"))
        status, _, err, _ = forks.run(words(command, world), die_at=step, die_of=signal.SIGINT)
        assert not list(world.rglob("*.tmp"))
        for name, (_, content) in snapshot(world).items():
            if content is not None:
                check_readable(name, content)
        if status == 0:
            break
        assert status == 130 and check_sentence(err).startswith("interrupted; "), err
    assert step > 1


def test_a_plan_and_what_is_told_of_it_are_never_taken_from_two_triages(
    new_world: Callable[[str], Path], forks: Forks
) -> None:
    """Killed between its two files, a triage is reported as one to be made again."""
    refused = 0
    for step in range(20):
        world = new_world(f"w{step}")
        killed, *_ = forks.run(words("triage {w}/run --budget 25", world), die_at=step)
        status, _, err, _ = forks.run(words("report {w}/run", world))
        if status == 0:
            run = RunDir.open(world / "run")
            assert Counter(run.triage()["routes"]) == Counter(run.plan()["route"].to_pylist())
        else:
            assert re.search(r"triage\.json .* tells of the plan", check_sentence(err))
            refused += 1
        if killed == 0:
            break
    assert refused


def test_labels_of_a_batch_that_was_cut_in_two_are_bought_by_the_same_import(
    world: Path, forks: Forks
) -> None:
    """The kernel may write half of a batch; the torn line is told and stays."""
    good("annotate import {w}/run {w}/labels.csv", world)
    ledger = world / "run" / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:-30])
    status, out, err, _ = forks.run(
        words("annotate import {w}/run {w}/labels.csv", world),
    )
    assert (status, err.count("\n")) == (0, 1), err
    assert re.fullmatch(r"warning: .*ledger\.jsonl: 1 incomplete line.* line 40.*\.\n", err), err
    assert "1 labels added, 39 were in the ledger already" in out
    with pytest.warns(UserWarning, match="line 40"):
        assert RunDir.open(world / "run").ledger().labels().keys() == set(ids(world))


def test_a_scored_run_can_be_made_again_over_its_own_parts(world: Path) -> None:
    """The world's invented scores are what `score` would merge, byte for byte."""
    before = snapshot(world / "run")
    write_scores(world)
    assert snapshot(world / "run") == before
