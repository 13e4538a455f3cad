"""Re-triage from a run directory, requests out, labels in."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest

from pivottrace_verl.annotation import import_labels
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.pool import RunDir
from pivottrace_verl.retriage import RetriageConfig
from pivottrace_verl.retriage_files import Requests, start_retriage
from pivottrace_verl.retriage_labels import BudgetLeft, LabelFeed
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
    written = Requests(run).write(4, prompts_of(run, ids), dict.fromkeys(ids, 1))
    assert written is not None
    path, n = written
    assert (path.name, n) == ("step-000004.csv", 2)
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
    ids = trained(run)
    u = dict.fromkeys(ids, 0.5)
    first = Requests(run).write(4, prompts_of(run, ids[:2]), u)
    assert first is not None
    held = first[0].read_bytes()
    # Another process, as after a resume.
    again = Requests(run)
    assert again.write(4, prompts_of(run, ids[:2]), u) is None
    second = again.write(4, prompts_of(run, ids[:3]), u)
    assert second is not None and (second[0].name, second[1]) == ("step-000004-1.csv", 1)
    assert first[0].read_bytes() == held and ids[0] not in second[0].read_text()


@pytest.mark.parametrize(
    "content",
    [b"", b"pt_id;prompt;label\n", "pt_id,label\nx,\u00e9".encode("cp1252"), b'pt_id,"', None],
    ids=["empty", "semicolons", "cp1252", "half-saved", "taken away"],
)
def test_what_the_annotator_makes_of_a_request_is_never_looked_at(
    run: RunDir, content: bytes | None
) -> None:
    ids = trained(run)
    u = dict.fromkeys(ids, 0.5)
    first = Requests(run).write(4, prompts_of(run, ids[:2]), u)
    assert first is not None
    if content is None:
        first[0].unlink()
    else:
        first[0].write_bytes(content)
    for requests in (Requests(run), Requests(run)):
        assert requests.write(8, prompts_of(run, ids[:2]), u) is None
    third = requests.write(8, prompts_of(run, ids[:3]), u)
    assert third is not None and third[1] == 1


def test_requests_are_known_by_the_step_they_were_made_at(run: RunDir) -> None:
    ids = trained(run)
    u = dict.fromkeys(ids, 0.5)
    Requests(run).write(4, prompts_of(run, ids[:2]), u)
    Requests(run).write(8, prompts_of(run, ids[1:3]), u)
    again = Requests(run)
    assert (again.until(3), again.until(4), again.until(8)) == ([], ids[:2], ids[:3])
    assert (again.after(4), again.after(8)) == (ids[2:3], [])


def test_a_log_that_is_not_ours_is_refused_in_a_sentence(run: RunDir) -> None:
    (run.path / "train").mkdir(exist_ok=True)
    for content in (
        b"{",
        b"[]",
        b'{"step": 1}',
        b'{"pt_id": "a"}',
        b'{"pt_id": "a", "step": "x"}',
        b"\xff",
    ):
        (run.path / "train" / "requests.jsonl").write_bytes(content)
        with pytest.raises(PivotTraceError, match=r"requests\.jsonl is not the log"):
            Requests(run)


def set_plan(run: RunDir, **info: object) -> None:
    file = run.path / "triage.json"
    content = {**json.loads(file.read_text()), **info}
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_a_plan_made_by_hand_is_refused_at_the_start(run: RunDir) -> None:
    set_plan(run, config=None)
    with pytest.raises(PivotTraceError, match=r"triage\.json holds no config, estimator and dir"):
        start_retriage(run, trained(run), CONFIG)
    assert BudgetLeft(run, run.ledger(), RetriageConfig()).now() is None


def test_a_plan_with_settings_of_another_version_is_refused_at_the_start(run: RunDir) -> None:
    set_plan(run, config={"budget": 20, "shiny": 1})
    with pytest.raises(PivotTraceError, match="was made with shiny, which this version does not"):
        start_retriage(run, trained(run), CONFIG)


def test_a_quota_of_a_source_that_is_not_in_training_is_no_obstacle(run: RunDir) -> None:
    plan = run.triage()["config"]
    set_plan(run, config={**plan, "quotas": {"gone": 3, "sums": N + 2}})
    moves = start_retriage(run, trained(run), CONFIG).move(list(run.ledger().labels()), spent=N)
    assert moves.refused is None and len(moves.asked) == 2


def test_too_few_probes_are_told_at_the_start(run: RunDir) -> None:
    wanted = json.loads((run.path / "probes.json").read_text())
    wanted["pt_ids"] = wanted["pt_ids"][:5]
    (run.path / "probes.json").write_text(json.dumps(wanted))
    with pytest.raises(PivotTraceError, match="Only 5 probes are labelled"):
        start_retriage(run, trained(run), CONFIG)


def bought(run: RunDir, pt_id: str, label: str = "9") -> None:
    run.ledger().append([{"pt_id": pt_id, "label": label, "purpose": "annotate", **WHO}])


def feed_of(run: RunDir, waiting: list[str]) -> LabelFeed:
    return LabelFeed(run, run.ledger(), waiting)


def unlabelled(run: RunDir) -> list[str]:
    return [i for i in trained(run) if i not in run.ledger().labels()]


def test_a_label_is_used_from_the_step_at_which_it_is_seen(run: RunDir) -> None:
    waiting = unlabelled(run)
    feed = feed_of(run, waiting)
    assert feed.arrived(1) == {}
    bought(run, waiting[3])
    assert feed.label(waiting[3]) is None
    assert feed.arrived(2) == {waiting[3]: "9"}
    assert (feed.label(waiting[3]), feed.arrived(3)) == ("9", {})
    assert feed.bought(3).spent == N + 1


def test_a_label_that_comes_while_a_step_runs_counts_at_its_end_and_is_used_at_the_next(
    run: RunDir,
) -> None:
    waiting = unlabelled(run)
    feed = feed_of(run, waiting)
    feed.arrived(1)
    bought(run, waiting[3])
    found = feed.bought(1)
    assert (found.unused, found.spent, len(found.used)) == ([waiting[3]], N + 1, N)
    assert feed.label(waiting[3]) is None
    assert feed.arrived(2) == {waiting[3]: "9"}
    assert feed.bought(2).unused == []


def test_a_resumed_run_uses_and_counts_a_label_from_the_same_step_on(run: RunDir) -> None:
    waiting = unlabelled(run)

    def steps(feed: LabelFeed, first: int, arriving: dict[tuple[int, str], str]) -> list[object]:
        seen: list[object] = []
        for step in range(first, 7):
            for when in ("before", "within", "after"):
                if (step, when) in arriving:
                    bought(run, arriving[step, when])
                if when == "before":
                    seen.append(feed.arrived(step))
                elif when == "within":
                    seen.append(dataclasses.astuple(feed.bought(step)))
        return seen

    feed = feed_of(run, waiting)
    feed.arrived(1)
    state = feed.state_dict()
    labels = {(3, "within"): waiting[0], (4, "after"): waiting[1], (6, "before"): waiting[2]}
    expected = steps(feed, 2, labels)
    again = feed_of(run, waiting)
    again.load_state_dict(state)
    assert steps(again, 2, {}) == expected
    later = feed_of(run, waiting)
    later.load_state_dict(feed.state_dict())
    assert later.label(waiting[0]) == "9" and later.arrived(7) == {}


def test_labels_of_prompts_that_are_not_trained_on_only_count(run: RunDir) -> None:
    outside = next(p.pt_id for p in run.pool() if p.pt_id not in run.ledger().labels())
    feed = feed_of(run, [])
    bought(run, outside)
    assert feed.arrived(1) == {}
    assert outside in feed.bought(1).used


def test_a_label_that_was_used_and_is_gone_is_refused(run: RunDir) -> None:
    with pytest.raises(PivotTraceError, match=r"1 labels that .*ledger\.jsonl does not hold"):
        feed_of(run, ["x"]).load_state_dict({"used": ["x"]})


def test_the_budget_that_is_left_is_in_its_own_unit_and_follows_the_ledger(run: RunDir) -> None:
    of_plan = BudgetLeft(run, run.ledger(), RetriageConfig())
    given = BudgetLeft(run, run.ledger(), CONFIG)
    assert (of_plan.now(), given.now()) == (2.0, 4.0)
    bought(run, unlabelled(run)[0])
    assert (of_plan.now(), given.now()) == (1.0, 3.0)
    set_plan(run, config={"budget": None, "budget_cost": N + 1.5})
    assert BudgetLeft(run, run.ledger(), RetriageConfig()).now() == 0.5
