"""What steers a training run: routes, labels, weights and what a checkpoint keeps of them."""

import copy
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pivottrace_verl.curriculum import Items
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.pool import RunDir
from pivottrace_verl.training.steering import Steering, SteeringConfig
from tests.step_records import record
from tests.triaged_run import make_run, trained

BLOCK: dict[str, Any] = {
    "run": None,
    "curriculum": {},
    "vote": {},
    "weights": {},
    "guard": {"window": 4},
    "retriage": {},
    "rollouts": {"annotate": None, "self_train": None},
}
WHO = {"annotator": "ana", "source_file": "f", "purpose": "annotate"}


def config(**more: Any) -> SteeringConfig:
    return SteeringConfig.of({**BLOCK, **more}, batch_size=4, rollouts=8)


def plain(**more: Any) -> Steering:
    """Prompts a0..a3 with a label and s0..s3 without, as uncertain as their number says."""
    ids = [f"{r}{i}" for r in "as" for i in range(4)]
    route = ["annotate"] * 4 + ["self_train"] * 4
    items = Items.of(range(8), ids, route, [0.1, 0.5, 0.9, 1.0, 0.2, 0.3, 0.4, 0.5])
    return Steering(items, ids[:4], config(**more), lambda rows: [])


def row(pt_id: str, labeled: bool, truth: str | None = "7") -> dict[str, Any]:
    return {
        "prompt": "?",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"pt_id": pt_id, "labeled": labeled, "route": "?", "uncertainty": 0.5},
    }


def test_a_row_without_a_bought_label_carries_no_true_answer() -> None:
    dressed = plain().dress(row("s0", labeled=False, truth="the truth"))
    assert dressed["reward_model"] == {"style": "rule", "ground_truth": None}
    assert (dressed["extra_info"]["labeled"], dressed["extra_info"]["route"]) == (
        False,
        "self_train",
    )


def test_a_labelled_row_keeps_its_label_and_other_columns() -> None:
    given = row("a0", labeled=True)
    dressed = plain().dress(given)
    assert dressed == {**given, "extra_info": {**given["extra_info"], "route": "annotate"}}


def test_rollouts_differ_by_route_where_asked() -> None:
    steering = plain(rollouts={"annotate": None, "self_train": 16})
    assert steering.dress(row("s0", False))["__rollout_n__"] == 16
    assert steering.dress(row("a0", True))["__rollout_n__"] == 8
    with pytest.raises(PivotTraceError, match=r"rollouts\.annotate is 1"):
        config(rollouts={"annotate": 1, "self_train": None})


def test_metrics_hold_the_weight_in_force_and_the_gauges() -> None:
    steering = plain(weights={"self_train": 0.5})
    records = [("u", record("a0", True)), ("v", record("s0", False, weight=0.0))]
    metrics, told = steering.end(1, [*records, ("w", record("s1", False))])
    assert told == []
    assert metrics["pivottrace/self_train/weight"] == 0.25
    assert metrics["pivottrace/guard/probe_accuracy"] == 1.0
    assert metrics["pivottrace/seconds/vote"] == pytest.approx(0.003)
    assert metrics["pivottrace/seconds/trainer"] > 0.0
    assert all(type(value) is float for value in metrics.values())


def test_votes_are_measured_on_labelled_prompts_no_more_uncertain_than_self_train_ones() -> None:
    steering = plain(weights={"policy": "measured"})
    assert steering.weights(1)["self_train"] == 0.0
    right, wrong = record("a1", True), record("a3", True, majority_right=False)
    steering.end(1, [("u", right), ("v", wrong)])
    # a3 is more uncertain than any self_train prompt, and no measure of them.
    assert steering.weights(2)["self_train"] == 1.0
    with pytest.raises(PivotTraceError, match="no training prompt has a label"):
        Steering(Items.of([0], ["s0"], ["self_train"], [0.1]), [],
                 config(weights={"policy": "measured"}), lambda rows: [])  # fmt: skip


def test_groups_that_verl_does_not_train_on_are_counted_and_learnt_from() -> None:
    steering, alone = plain(), plain()
    trained_on = [("g0", record("s0", labeled=False))]
    aside = [("g1", record("a0")), ("g1", record("a0"))]
    metrics, _ = steering.end(1, trained_on, aside)
    without, _ = alone.end(1, trained_on)
    assert metrics["pivottrace/set_aside/annotate"] == 1
    assert without["pivottrace/set_aside/annotate"] == 0
    assert "pivottrace/annotate/reward" not in metrics
    assert steering.state_dict()["guard"] != alone.state_dict()["guard"]


def collapse(steering: Steering) -> list[str]:
    told = []
    for step, (agreement, right) in enumerate([(0.2, 1.0)] * 2 + [(0.9, 0.0)] * 2):
        records = [("u", record("a0", True, reward=right)),
                   ("v", record("s0", False, agreement=agreement))]  # fmt: skip
        told += steering.end(step, records)[1]
    return told


def test_a_collapse_lowers_the_self_train_weight_and_is_told() -> None:
    steering = plain()
    assert len(collapse(steering)) == 1
    assert steering.weights(9) == {"annotate": 1.0, "self_train": 0.5}


def test_a_collapse_stops_the_training_where_asked() -> None:
    with pytest.raises(PivotTraceError, match="Training stops"):
        collapse(plain(guard={"window": 4, "action": "stop"}))


# With a run directory


def steer(run: RunDir, **retriage: Any) -> Steering:
    plan = {r["pt_id"]: r for r in run.plan().to_pylist()}
    ids = trained(run)
    labelled = [pt_id for pt_id in ids if pt_id in BOUGHT]
    items = Items.of(
        range(len(ids)),
        ids,
        [plan[pt_id]["route"] for pt_id in ids],
        np.array([plan[pt_id]["uncertainty"] for pt_id in ids]),
    )
    pool = {p["pt_id"]: p for p in run.pool_table().to_pylist()}
    settings = {"enable": True, "every": 2, "budget": 20, **retriage}
    return Steering(
        items,
        labelled,
        config(run=str(run.path), retriage=settings),
        lambda rows: [pool[ids[row]] for row in rows],
    )


def play(
    steering: Steering, run: RunDir, step: int, bought: Sequence[str] = ()
) -> tuple[list[int], list[str]]:
    """One step whose rollouts follow from prompt and step: the rows drawn, and what was told. The
    labels `bought` come while it runs."""
    ids = trained(run)
    told = steering.begin(step)
    rows = list(islice(steering.curriculum, 4))
    records = []
    for index in rows:
        dressed = steering.dress(row(ids[index], ids[index] in BOUGHT, "1"))
        info = dressed["extra_info"]
        agreement = (int(ids[index], 16) + step) % 7 / 7
        one = record(ids[index], info["labeled"], route=info["route"], agreement=agreement)
        one["reward"] = agreement if info["labeled"] else 0.0
        records += [(f"{index}", one)]
    run.ledger().append([{"pt_id": pt_id, "label": "5", **WHO} for pt_id in bought])
    metrics, more = steering.end(step, records)
    assert metrics["pivottrace/budget/left"] >= 0
    return rows, told + more


BOUGHT: set[str] = set()


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = make_run(tmp_path)
    BOUGHT.clear()
    BOUGHT.update(made.ledger().labels())
    return made


def test_retriage_asks_for_labels_and_uses_them_when_they_come(run: RunDir) -> None:
    steering = steer(run)
    told = [sentence for step in (1, 2) for sentence in play(steering, run, step)[1]]
    assert any(sentence.startswith("Re-triage after step 2: ") for sentence in told)
    (request,) = (run.path / "train" / "requests").iterdir()
    assert any(str(request) in sentence for sentence in told)
    asked = request.read_text().splitlines()[-1].split(",")[0]
    run.ledger().append([{"pt_id": asked, "label": "5", **WHO}])
    _, told = play(steering, run, 3)
    assert told[0].startswith("1 labels arrived and are used from step 3 on")
    assert steering.dress(row(asked, False, "hidden"))["reward_model"]["ground_truth"] == "5"
    assert steering.curriculum.route_of(asked) == "annotate"


def test_the_budget_caps_what_is_asked_for_in_all(run: RunDir) -> None:
    steering = steer(run)
    for step in range(1, 13):
        play(steering, run, step)
    files = (run.path / "train" / "requests").iterdir()
    asked = [line for file in files for line in file.read_text().splitlines()[1:]]
    assert len(BOUGHT) + len(asked) <= 20


def test_a_request_that_is_half_filled_keeps_neither_training_nor_a_resumed_run_from_going_on(
    run: RunDir,
) -> None:
    steering = steer(run)
    play(steering, run, 1)
    state = copy.deepcopy(steering.state_dict())
    play(steering, run, 2)
    (request,) = (run.path / "train" / "requests").iterdir()
    for content in (b"", b"pt_id;label\nx;1\n", "pt_id,label\nx,\u00e9".encode("cp1252")):
        request.write_bytes(content)
        resumed = steer(run)
        resumed.load_state_dict(state)
        for step in range(2, 7):
            play(resumed, run, step)
    assert [file.name for file in (run.path / "train" / "requests").iterdir()] == [request.name]


def test_what_was_asked_for_after_the_checkpoint_counts_against_the_budget(run: RunDir) -> None:
    steering = steer(run)
    state = copy.deepcopy(steering.state_dict())
    for step in (1, 2):
        play(steering, run, step)
    asked = steering.state_dict()["retriage"]["asked"]
    resumed = steer(run)
    resumed.load_state_dict(state)
    for step in (1, 2):
        resumed.begin(step)
        # Rollouts that are not those of the first time make other prompts uncertain.
        for pt_id in set(trained(run)) - set(asked):
            resumed.end(step, [("g", record(pt_id, False, agreement=0.0))])
    assert set(asked) <= set(resumed.state_dict()["retriage"]["asked"])
    assert len(BOUGHT) + len(resumed.state_dict()["retriage"]["asked"]) <= 20


def test_labels_that_nobody_asked_for_count_from_the_moment_they_are_bought(run: RunDir) -> None:
    steering = steer(run, every=1)
    waiting = [pt_id for pt_id in trained(run) if pt_id not in BOUGHT]
    steering.begin(1)
    labels = [{"pt_id": i, "label": "5", **WHO} for i in waiting[:3]]
    run.ledger().append(labels)
    records = [("g", record(waiting[4], labeled=False))]
    metrics, _ = steering.end(1, records)
    assert metrics["pivottrace/budget/left"] == 20 - len(BOUGHT) - 3
    assert metrics["pivottrace/retriage/asked"] <= 20 - len(BOUGHT) - 3
    assert steering.begin(2)[0].startswith("3 labels arrived")


def test_the_budget_that_is_left_follows_the_ledger_at_every_step(run: RunDir) -> None:
    steering = steer(run, enable=False)
    bought = next(pt_id for pt_id in trained(run) if pt_id not in BOUGHT)
    left = []
    for step in (1, 2):
        steering.begin(step)
        left.append(steering.end(step, [])[0]["pivottrace/budget/left"])
        if step == 1:
            run.ledger().append([{"pt_id": bought, "label": "5", **WHO}])
    assert left[0] - left[1] == 1


@pytest.mark.parametrize("killed", [1, 2, 3, 5])
def test_a_resumed_run_draws_the_same_prompts_and_moves_the_same(
    run: RunDir, tmp_path: Path, killed: int
) -> None:
    whole = steer(run)
    expected = [play(whole, run, step)[0] for step in range(1, 9)]
    first = steer(run)
    found = [play(first, run, step)[0] for step in range(1, killed + 1)]
    state = copy.deepcopy(first.state_dict())
    second = steer(run)
    second.load_state_dict(state)
    found += [play(second, run, step)[0] for step in range(killed + 1, 9)]
    assert found == expected
    a, b = second.state_dict(), whole.state_dict()
    assert (a["retriage"]["values"] == b["retriage"]["values"]).all()
    assert a["retriage"]["asked"] == b["retriage"]["asked"]


@pytest.mark.parametrize("killed", [1, 2, 3, 4, 6])
def test_a_resumed_run_takes_in_labels_that_came_meanwhile_as_the_first_run_did(
    run: RunDir, killed: int
) -> None:
    whole, states, expected = steer(run), [], []
    unasked = trained(run)[-3]
    for step in range(1, 9):
        # Of those asked for after step 2, one comes in step 4 and one in step 5.
        asked = whole.state_dict()["retriage"]["asked"]
        come = {3: [unasked], 4: asked[:1], 5: asked[1:2]}.get(step, [])
        come = [pt_id for pt_id in come if pt_id not in run.ledger().labels()]
        expected.append(play(whole, run, step, come)[0])
        states.append(copy.deepcopy(whole.state_dict()))
    resumed = steer(run)
    resumed.load_state_dict(states[killed - 1])
    found = [play(resumed, run, step)[0] for step in range(killed + 1, 9)]
    assert found == expected[killed:]
    a, b = resumed.state_dict(), whole.state_dict()
    assert (a["curriculum"]["moved"]["route"] == b["curriculum"]["moved"]["route"]).all()
    assert (a["curriculum"]["moved"]["since"] == b["curriculum"]["moved"]["since"]).all()
    for part in ("asked", "last", "probes"):
        assert a["retriage"][part] == b["retriage"][part]


def test_off_the_plans_routes_stay(run: RunDir) -> None:
    steering = steer(run, enable=False)
    for step in range(1, 9):
        assert play(steering, run, step)[1] == []
    assert steering.state_dict()["curriculum"]["moved"] is None
    assert not (run.path / "train").exists()


def test_a_checkpoint_of_other_settings_is_refused(run: RunDir) -> None:
    state = steer(run).state_dict()
    with pytest.raises(PivotTraceError, match="enable=true, but this run has false"):
        steer(run, enable=False).load_state_dict(state)
    for changed, sentence in (
        ({"vote": {"quorum": 3}}, r"saved with pivottrace\.vote\.quorum=2, but this run has 3\."),
        (
            {"curriculum": {"order": "random"}, "weights": {"self_train": 0.5}},
            r"order=mixed, pivottrace\.weights\.self_train=1\.0, but this run has random, 0\.5\.",
        ),
    ):
        with pytest.raises(PivotTraceError, match=sentence):
            plain(**changed).load_state_dict(plain().state_dict())
    with pytest.raises(PivotTraceError, match="earlier version"):
        steer(run).load_state_dict({"format": 1, "fingerprint": "x"})
    del state["settings"]["pivottrace.answers"]
    with pytest.raises(PivotTraceError, match="earlier version"):
        steer(run).load_state_dict(state)


MEANING: dict[str, Any] = {
    "answers": "math",
    "request_seed": None,
    "detector": {"signal": "response_long_mass", "tau": 0.05},
    "capture": {"enable": True, "layers": [3, 5], "heads": None, "wire": "float32"},
}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"answers": "exact"}, r"pivottrace\.answers=math, but this run has exact\."),
        ({"request_seed": 7}, r"pivottrace\.request_seed=null, but this run has 7\."),
        ({"detector": {**MEANING["detector"], "tau": 0.1}},
         r"pivottrace\.detector\.tau=0\.05, but this run has 0\.1\."),
        ({"capture": {**MEANING["capture"], "layers": [3]}},
         r"pivottrace\.capture\.layers=\[3, 5\], but this run has \[3\]\."),
        ({"capture": {**MEANING["capture"], "heads": [[0], [1]]}},
         r"pivottrace\.capture\.heads=null, but this run has \[\[0\], \[1\]\]\."),
    ],
)  # fmt: skip
def test_a_checkpoint_whose_rewards_or_traces_meant_something_else_is_refused(
    changed: dict[str, Any], said: str
) -> None:
    state = plain(**MEANING).state_dict()
    plain(**MEANING).load_state_dict(state)
    with pytest.raises(PivotTraceError, match=said):
        plain(**{**MEANING, **changed}).load_state_dict(state)


def test_how_traces_travel_may_change_between_attempts() -> None:
    other = {**MEANING, "capture": {**MEANING["capture"], "wire": "float16"}}
    plain(**other).load_state_dict(plain(**MEANING).state_dict())


def test_a_checkpoint_of_other_prompts_is_refused_and_both_are_named() -> None:
    state = plain().state_dict()
    items = Items.of([0], ["other"], ["annotate"], [0.5])
    other = Steering(items, ["other"], config(), lambda rows: [])
    mine = other.state_dict()["curriculum"]["fingerprint"]
    theirs = state["curriculum"]["fingerprint"]
    with pytest.raises(PivotTraceError, match=f"curriculum {theirs} belongs to .* {mine}"):
        other.load_state_dict(state)
    assert other.state_dict()["curriculum"]["drawn"] == [0, 0]


def test_retriage_without_a_run_directory_is_refused() -> None:
    with pytest.raises(PivotTraceError, match=r"pivottrace\.run names no run directory"):
        config(retriage={"enable": True})
