"""The collapse rule and the gauges."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.guards import Guard, GuardConfig
from pivottrace_verl.observed import Observed


def group(labeled, *, agreement=0.5, accuracy=0.5, right=True, votes=True, **more):
    return Observed(
        **{
            "pt_id": "p",
            "route": "annotate" if labeled else "self_train",
            "labeled": labeled,
            "reward": accuracy,
            "pass_rate": accuracy if labeled else None,
            "majority_right": right if labeled else None,
            "votes": votes,
            "agreement": agreement,
            "answer_entropy": 0.7,
            "n_tokens": 30.0,
            "values": {},
            **more,
        }
    )


def everyone(_):
    return True


def always(pt_ids):
    """No prompt ever moved."""
    return [0] * len(pt_ids)


def run(guard, steps, seed=0):
    """(agreement, accuracy) a step, with a little noise; the steps with a verdict."""
    rng, told = random.Random(seed), []
    for step, (agreement, accuracy) in enumerate(steps):
        noise = [rng.uniform(-0.01, 0.01) for _ in range(2)]
        groups = [
            group(False, agreement=agreement + noise[0]),
            group(True, accuracy=accuracy + noise[1]),
        ]
        if guard.observe(step, groups, everyone, always):
            told.append(step)
    return told


def line(start, end, n=20):
    return [start + (end - start) * i / (n - 1) for i in range(n)]


COLLAPSE = list(zip(line(0.4, 0.9), line(0.6, 0.3), strict=True))


def test_agreement_that_rises_while_accuracy_falls_lowers_the_weight_and_says_so():
    guard = Guard(GuardConfig())
    assert run(guard, COLLAPSE) == [19]
    assert guard.factor == 0.5
    assert guard.metrics()["guard/verdicts"] == 1


def test_a_verdict_is_a_sentence_with_both_changes():
    guard = Guard(GuardConfig(window=4))
    steps = [(0.4, 0.8), (0.4, 0.8), (0.8, 0.4), (0.8, 0.4)]
    told = [
        guard.observe(step, [group(False, agreement=a), group(True, accuracy=b)], everyone, always)
        for step, (a, b) in enumerate(steps)
    ]
    assert told[:3] == [None] * 3
    assert "rose by 0.40" in told[3] and "fell by 0.40" in told[3] and "0.5" in told[3]


def test_stop_ends_training_with_a_sentence_that_says_what_to_do():
    with pytest.raises(PivotTraceError, match=r"Training stops: over the last 20 steps.*min_agre"):
        run(Guard(GuardConfig(action="stop")), COLLAPSE)


@pytest.mark.parametrize(
    "steps",
    [
        list(zip(line(0.4, 0.9), line(0.3, 0.6), strict=True)),
        list(zip(line(0.9, 0.4), line(0.6, 0.3), strict=True)),
        list(zip(line(0.4, 0.9), line(0.5, 0.5), strict=True)),
        list(zip(line(0.40, 0.46), line(0.50, 0.44), strict=True)),
        COLLAPSE[:19],
    ],
    ids=["both rise", "both fall", "accuracy stays", "too small", "too short"],
)
def test_what_is_no_collapse_gives_no_verdict(steps):
    assert run(Guard(GuardConfig()), steps) == []


def test_noise_alone_gives_hardly_a_verdict():
    rng, told = random.Random(1), 0
    for _ in range(200):
        guard = Guard(GuardConfig())
        noise = [(rng.gauss(0.6, 0.1), rng.gauss(0.5, 0.1)) for _ in range(20)]
        told += len(run(guard, noise))
    assert told <= 2


def test_a_verdict_is_not_repeated_before_the_window_is_full_again():
    guard = Guard(GuardConfig())
    assert run(guard, [*COLLAPSE, *COLLAPSE]) == [19, 39]
    assert guard.factor == 0.25


def test_off_keeps_the_gauges_and_gives_no_verdict():
    guard = Guard(GuardConfig(action="off"))
    assert run(guard, COLLAPSE) == []
    assert guard.metrics()["guard/agreement"] == pytest.approx(0.9, abs=0.02)


def test_pseudo_label_accuracy_is_of_the_votes_that_count_among_those_that_stand_for_the_rest():
    guard = Guard(GuardConfig())
    groups = [
        group(True, right=True, pt_id="in"),
        group(True, right=False, pt_id="in"),
        group(True, right=False, pt_id="in", votes=False),
        group(True, right=False, pt_id="out"),
        group(False),
    ]
    guard.observe(1, groups, lambda g: g.pt_id == "in", always)
    assert guard.metrics()["guard/pseudo_label_accuracy"] == 0.5


def test_without_labelled_groups_there_is_no_verdict_and_no_made_up_gauge():
    guard = Guard(GuardConfig(window=4))
    for step, agreement in enumerate((0.1, 0.2, 0.8, 0.9)):
        voted = [group(False, agreement=agreement)]
        assert guard.observe(step, voted, everyone, always) is None
    assert "guard/probe_accuracy" not in guard.metrics()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 39))
def test_a_resumed_guard_gives_the_same_verdicts(killed):
    steps = [*COLLAPSE, *COLLAPSE]
    whole, first, second = (Guard(GuardConfig()) for _ in range(3))
    told = run(whole, steps)
    rng = random.Random(0)
    exact = [(a + rng.uniform(-0.01, 0.01), b + rng.uniform(-0.01, 0.01)) for a, b in steps]
    found = []
    for step, (a, b) in enumerate(exact):
        if step == killed:
            second.load_state_dict(first.state_dict())
        guard = first if step < killed else second
        groups = [group(False, agreement=a), group(True, accuracy=b)]
        if guard.observe(step, groups, everyone, always):
            found.append(step)
    assert found == told


def move_and_watch(level, every, share, steps=120, seed=0):
    """The steps with a verdict, where every so often that share of the self_train prompts, the
    hardest, moves to the labelled ones; a prompt agrees, or is right, with
    `level(ease, step, labeled)`, ease in [0, 1]."""
    rng, guard, told, since = random.Random(seed), Guard(GuardConfig()), [], {}
    voted, known = list(range(400)), list(range(400, 480))
    ease = [i / 400 for i in voted] + [i / 80 for i in range(80)]

    def since_when(ids):
        return [since.get(i, 0) for i in ids]

    for step in range(1, steps + 1):
        groups = [
            group(
                labeled,
                pt_id=str(i),
                **{name: level(ease[i], step, labeled) + rng.gauss(0, 0.05)},
            )
            for labeled, name, prompts in (
                (False, "agreement", voted),
                (True, "accuracy", known),
            )
            for i in rng.sample(prompts, min(16, len(prompts)))
        ]
        if guard.observe(step, groups, everyone, since_when):
            told.append(step)
        if step % every == 0:
            moved = voted[: int(share * len(voted))]
            voted, known = voted[len(moved) :], known + moved
            since.update(dict.fromkeys(map(str, moved), step + 1))
    return told


often = pytest.mark.parametrize(("every", "share"), [(1, 0.02), (5, 0.1), (20, 0.3), (50, 0.4)])


@often
def test_prompts_that_change_their_route_are_not_taken_for_a_collapse(every, share):
    def nothing_learnt(ease, step, labeled):
        return 0.2 + 0.6 * ease

    for seed in range(5):
        assert move_and_watch(nothing_learnt, every, share, seed=seed) == []


@often
def test_a_collapse_is_seen_however_often_prompts_move(every, share):
    def collapse(ease, step, labeled):
        way = min(1.0, max(0.0, (step - 30) / 50))
        return 0.3 + 0.2 * ease + (0.4 - 0.5 * way if labeled else 0.5 * way)

    assert move_and_watch(collapse, every, share)


def test_a_window_in_which_every_prompt_moved_gives_no_verdict():
    guard, steps = Guard(GuardConfig(window=4)), [(0.4, 0.8), (0.4, 0.8), (0.8, 0.4), (0.8, 0.4)]
    for step, (a, b) in enumerate(steps):
        groups = [group(False, agreement=a), group(True, accuracy=b)]
        assert guard.observe(step, groups, everyone, lambda ids: [3] * len(ids)) is None


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"action": "warn"}, "warn"),
        ({"window": 5}, "5 steps"),
        ({"window": 2}, "2 steps"),
        ({"change": 0.0}, "change is 0.0"),
        ({"factor": 1.0}, "factor 1.0"),
    ],
)
def test_a_guard_that_cannot_work_is_refused_in_a_sentence(config, said):
    with pytest.raises(PivotTraceError, match=said):
        GuardConfig(**config)
