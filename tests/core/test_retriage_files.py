"""Re-triage from a run directory, requests out, labels in."""

import csv
from pathlib import Path

import pytest

from pivottrace_verl.annotation import import_labels
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.pool import RunDir
from pivottrace_verl.retriage import RetriageConfig
from pivottrace_verl.retriage_files import LabelFeed, budget_left, start_retriage, write_request
from tests.triaged_run import WHO, N, make_run, trained


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path)


CONFIG = RetriageConfig(enable=True, budget=N + 4)


def test_retriage_starts_from_the_runs_plan_scores_and_probes(run: RunDir) -> None:
    moves = start_retriage(run, trained(run), CONFIG).move(list(run.ledger().labels()), spent=N)
    assert len(moves.asked) == 4 and set(moves.asked) <= set(trained(run))
    assert len(moves.annotate) == len(trained(run))


def test_prompts_of_another_run_are_refused(run: RunDir) -> None:
    with pytest.raises(PivotTraceError, match=r"1 training prompts are not in the run.*feed"):
        start_retriage(run, [*trained(run), "feed"], CONFIG)


def test_labels_that_came_since_do_not_keep_a_run_from_going_on(run: RunDir) -> None:
    *ids, outside = trained(run)
    before = start_retriage(run, ids, CONFIG)
    bought(run, outside)
    bought(run, ids[-1])
    start_retriage(run, ids, CONFIG).load_state_dict(before.state_dict())


def test_true_answers_in_the_pool_that_were_not_bought_change_nothing(tmp_path: Path) -> None:
    decided = []
    for name, hidden in (("plain", "41"), ("poisoned", "nonsense")):
        run = make_run(tmp_path / name, hidden)
        moves = start_retriage(run, trained(run), CONFIG).move(list(run.ledger().labels()), N)
        decided.append((moves.asked, moves.annotate.tolist(), moves.resting.tolist()))
    assert decided[0] == decided[1]


def prompts_of(run: RunDir, pt_ids: list[str]) -> list[dict]:
    table = {row["pt_id"]: row for row in run.pool_table().to_pylist()}
    return [table[pt_id] for pt_id in pt_ids]


def test_a_request_is_a_queue_file_that_annotate_import_takes(run: RunDir) -> None:
    ids = trained(run)[-2:]
    path = write_request(
        run.path / "train/requests", 4, prompts_of(run, ids), dict.fromkeys(ids, 1)
    )
    assert path is not None and path.name == "step-000004.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["pt_id"] for row in rows] == ids
    # A cell that a spreadsheet would take for a formula is guarded.
    assert not rows[0]["prompt"].startswith("=")
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "label": "7"} for row in rows)
    assert import_labels(run, path, "ana").added == 2
    assert {run.ledger().labels()[pt_id] for pt_id in ids} == {"7"}


def test_a_request_never_replaces_a_file_nor_asks_twice(run: RunDir) -> None:
    folder, ids = run.path / "train" / "requests", trained(run)
    u = dict.fromkeys(ids, 0.5)
    first = write_request(folder, 4, prompts_of(run, ids[:2]), u)
    assert first is not None
    held = first.read_bytes()
    assert write_request(folder, 4, prompts_of(run, ids[:2]), u) is None
    second = write_request(folder, 4, prompts_of(run, ids[:3]), u)
    assert second is not None and second.name == "step-000004-1.csv"
    assert first.read_bytes() == held and ids[0] not in second.read_text()


def bought(run: RunDir, pt_id: str, label: str = "9") -> None:
    run.ledger().append([{"pt_id": pt_id, "label": label, "purpose": "annotate", **WHO}])


def test_a_label_is_used_from_the_step_at_which_it_is_seen(run: RunDir) -> None:
    waiting = [i for i in trained(run) if i not in run.ledger().labels()]
    feed = LabelFeed(run, waiting)
    assert feed.arrived(1) == {}
    bought(run, waiting[3])
    assert feed.label(waiting[3]) is None
    assert feed.arrived(2) == {waiting[3]: "9"}
    assert (feed.label(waiting[3]), feed.arrived(3)) == ("9", {})
    assert feed.spent == N + 1


def test_a_resumed_run_uses_a_label_from_the_same_step_on(run: RunDir) -> None:
    waiting = [i for i in trained(run) if i not in run.ledger().labels()]
    feed = LabelFeed(run, waiting)
    feed.arrived(1)
    state = feed.state_dict()
    bought(run, waiting[0])
    assert list(feed.arrived(4)) == [waiting[0]]
    again = LabelFeed(run, waiting)
    again.load_state_dict(state)
    assert [list(again.arrived(step)) for step in (2, 3, 4, 5)] == [[], [], [waiting[0]], []]
    later = LabelFeed(run, waiting)
    later.load_state_dict(feed.state_dict())
    assert later.label(waiting[0]) == "9" and later.arrived(5) == {}


def test_labels_of_prompts_that_are_not_trained_on_only_count(run: RunDir) -> None:
    outside = next(p.pt_id for p in run.pool() if p.pt_id not in run.ledger().labels())
    feed = LabelFeed(run, [])
    bought(run, outside)
    assert feed.arrived(1) == {}
    assert outside in feed.bought


def test_a_label_that_was_used_and_is_gone_is_refused(run: RunDir) -> None:
    with pytest.raises(PivotTraceError, match=r"1 labels that .*ledger\.jsonl does not hold"):
        LabelFeed(run, ["x"]).load_state_dict({"used": ["x"]})


def test_the_budget_that_is_left_is_in_the_budgets_own_unit(run: RunDir) -> None:
    assert budget_left(run, RetriageConfig(), N, 99.0) == 2.0
    assert budget_left(run, CONFIG, N + 1, 99.0) == 3.0
