"""Bad input, case by case: one sentence, exit status 2, and every file as it was."""

import re
from pathlib import Path

import bad_labels
import bad_pools
import bad_runs
import pytest
from bad_world import Case, call, check_sentence, good, ids, snapshot

from pivottrace_verl.annotation import export_queue
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.pool import RunDir

CASES = [*bad_pools.CASES, *bad_labels.CASES, *bad_runs.CASES]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_refused_in_a_sentence_and_changes_nothing(case: Case, world: Path) -> None:
    case.arrange(world)
    before = snapshot(world)
    ran = call(case.command, world)
    assert ran.status == 2, ran
    assert re.search(case.says, check_sentence(ran.err)), ran.err
    assert snapshot(world) == before


def test_an_export_of_unknown_or_repeated_prompts_is_refused(world: Path) -> None:
    """What the verb never asks for, but a caller of the function may."""
    before = snapshot(world)
    run, (first, *_) = RunDir.open(world / "run"), ids(world)
    for wanted, says in (([first, "stranger"], "stranger"), ([first, first], "more than once")):
        with pytest.raises(PivotTraceError, match=says):
            export_queue(run, wanted, world / "q.csv")
    assert snapshot(world) == before


def test_work_that_was_imported_may_be_exported_over(world: Path) -> None:
    bad_labels.half_filled(world)
    assert call("annotate export {w}/run {w}/queue.csv", world).status == 2
    good("annotate import {w}/run {w}/queue.csv", world)
    good("annotate export {w}/run {w}/queue.csv", world)


def test_every_case_has_a_name_of_its_own_and_there_are_enough() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 100
