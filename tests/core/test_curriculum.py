"""The curriculum's promises, for any mix of routes."""

import copy
import math
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pivottrace_verl.curriculum import ORDERS, Curriculum, CurriculumConfig, Item
from pivottrace_verl.errors import PivotTraceError

quick = settings(deadline=None, max_examples=50)


def make_items(annotate, self_train, first=0):
    routes = ["annotate"] * annotate + ["self_train"] * self_train
    n = len(routes)
    return [
        Item(first + i, f"id{i:03d}", route, uncertainty=1 - i / max(1, n - 1))
        for i, route in enumerate(routes)
    ]


def take(curriculum, n):
    return list(islice(curriculum, n))


def make(items, batch_size=2, order="mixed", seed=0, **more):
    return Curriculum(items, CurriculumConfig(batch_size, order, seed, **more))


sizes = st.tuples(st.integers(0, 12), st.integers(0, 12)).filter(any)
orders = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 9),
        "order": st.sampled_from(ORDERS),
        "seed": st.integers(0, 2**40),
    }
)
shares = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 9),
        "seed": st.integers(0, 2**40),
        "annotate_share": st.floats(0, 1),
        "annotate_share_end": st.floats(0, 1),
        "share_steps": st.integers(1, 5),
    }
)
bounded = st.fixed_dictionaries(
    {
        "batch_size": st.integers(4, 9),
        "order": st.sampled_from(ORDERS),
        "seed": st.integers(0, 2**40),
        "min_annotate_share": st.floats(0, 0.25),
        "max_annotate_share": st.floats(0.5, 1),
    }
)
curricula = st.tuples(sizes, orders | shares | bounded)
unbounded = st.tuples(sizes, orders | shares)


def made(spec):
    return make(make_items(*spec[0]), **spec[1])


@quick
@given(unbounded, st.integers(1, 3))
def test_every_prompt_comes_exactly_once_a_pass(spec, passes):
    n = sum(spec[0])
    drawn = take(made(spec), n * passes)
    for k in range(passes):
        assert sorted(drawn[k * n : (k + 1) * n]) == list(range(n))


@quick
@given(curricula, st.integers(0, 60), st.integers(1, 60))
def test_a_resumed_curriculum_goes_on_as_an_uninterrupted_one(spec, before, after):
    whole = made(spec)
    expected = take(whole, before + after)[before:]
    killed = made(spec)
    take(killed, before)
    killed.observe([{"pt_id": "id000", "route": "annotate", "reward": 1.0, "agreement": None}])
    state = copy.deepcopy(killed.state_dict())
    resumed = made(spec)
    resumed.load_state_dict(state)
    assert resumed.metrics() == killed.metrics()
    assert take(resumed, after) == expected


@quick
@given(curricula)
def test_the_order_of_the_items_given_does_not_matter(spec):
    items = make_items(*spec[0])
    assert take(make(items, **spec[1]), 40) == take(make(items[::-1], **spec[1]), 40)


@quick
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 99), st.data())
def test_every_stretch_of_a_mixed_pass_holds_the_routes_in_proportion(a, s, seed, data):
    start = data.draw(st.integers(0, a + s - 1))
    length = data.draw(st.integers(1, a + s - start))
    drawn = take(make(make_items(a, s), 4, seed=seed), a + s)[start : start + length]
    labelled = sum(index < a for index in drawn)
    assert abs(labelled - length * a / (a + s)) <= 2


def test_annotate_share_sets_each_batch_until_a_route_runs_out():
    drawn = take(make(make_items(10, 30), 4, annotate_share=0.5), 40)
    batches = [sum(i < 10 for i in drawn[k : k + 4]) for k in range(0, 40, 4)]
    assert batches == [2, 2, 2, 2, 2, 0, 0, 0, 0, 0]


def test_easy_to_hard_and_uncertainty_first_follow_the_uncertainty_every_pass():
    items = make_items(3, 3)
    assert take(make(items, 2, "easy_to_hard"), 12) == [5, 4, 3, 2, 1, 0] * 2
    assert take(make(items, 2, "uncertainty_first"), 12) == [0, 1, 2, 3, 4, 5] * 2


@pytest.mark.parametrize("order", ["mixed", "random"])
def test_passes_and_seeds_differ_where_the_order_is_drawn(order):
    drawn = take(make(make_items(15, 15), 4, order, seed=1), 60)
    assert drawn[:30] != drawn[30:]
    assert drawn[:30] != take(make(make_items(15, 15), 4, order, seed=2), 30)


def test_data_set_indices_are_given_out_whatever_they_are():
    assert sorted(take(make(make_items(2, 2, first=100), 2), 4)) == [100, 101, 102, 103]


def row(pt_id, route, reward, **more):
    return {"pt_id": pt_id, "route": route, "reward": reward, **more}


def test_metrics_count_what_was_drawn_and_show_the_latest_step_by_route():
    curriculum = make(make_items(2, 2), 2)
    take(curriculum, 6)
    curriculum.observe([row("id000", "annotate", 0.0, agreement=0.1)])
    curriculum.observe(
        [
            row("id000", "annotate", 1.0, agreement=None),
            row("id001", "annotate", 0.0),
            row("id003", "self_train", 1.0, agreement=0.75),
        ]
    )
    metrics = curriculum.metrics()
    assert metrics["curriculum/passes"] == 1.5
    assert metrics["curriculum/batches"] == 3
    assert metrics["curriculum/drawn/annotate"] + metrics["curriculum/drawn/self_train"] == 6
    assert metrics["curriculum/observed"] == 4
    assert metrics["curriculum/annotate/reward"] == 0.5
    assert metrics["curriculum/self_train/agreement"] == 0.75
    assert "curriculum/annotate/agreement" not in metrics
    assert all(isinstance(value, float) for value in metrics.values())


@pytest.mark.parametrize(
    "other",
    [
        make(make_items(3, 2), 2),
        make(make_items(2, 3), 2, seed=1),
        make(make_items(2, 3), 3),
        make(make_items(2, 3), 2, "random"),
        make(make_items(2, 3), 2, annotate_share=0.5),
    ],
)
def test_a_state_of_other_items_or_settings_is_refused_and_both_are_named(other):
    curriculum = make(make_items(2, 3), 2)
    take(other, 3)
    state = other.state_dict()
    with pytest.raises(PivotTraceError) as error:
        curriculum.load_state_dict(state)
    assert state["fingerprint"] in str(error.value)
    assert curriculum.state_dict()["fingerprint"] in str(error.value)
    assert curriculum.state_dict()["taken"] == [0, 0]


def test_a_state_of_an_unknown_format_or_place_is_refused():
    curriculum = make(make_items(2, 3), 2)
    for change in ({"format": 1}, {"taken": [-1, 0]}, {"pass": -1}):
        with pytest.raises(PivotTraceError):
            curriculum.load_state_dict({**curriculum.state_dict(), **change})


@pytest.mark.parametrize(
    ("items", "args", "said"),
    [
        ([], {}, "no prompts"),
        ([Item(0, "a", "drop", 0.1)], {}, "drop"),
        ([Item(0, "a", "annotate", 0.1), Item(0, "b", "annotate", 0.1)], {}, "index 0 2 times"),
        ([Item(0, "a", "annotate", 0.1), Item(1, "a", "annotate", 0.1)], {}, "pt_id a 2 times"),
        ([Item(0, "a", "annotate", float("nan"))], {}, "finite"),
        (make_items(1, 1), {"order": "best"}, "best"),
        (make_items(1, 1), {"batch_size": 0}, "batch_size"),
        (make_items(1, 1), {"annotate_share": 1.5}, "1.5"),
        (
            make_items(1, 1),
            {"annotate_share": 0.5, "order": "random"},
            "belongs to the order mixed",
        ),
        (make_items(1, 1), {"annotate_share": 0.5, "share_steps": 5}, "annotate_share_end"),
        (make_items(1, 1), {"min_annotate_share": 0.3, "max_annotate_share": 0.4}, "No number"),
        (make_items(1, 1), {"min_annotate_share": 0.9}, "no place for self_train"),
        (make_items(1, 1), {"max_annotate_share": 0.1}, "no place for annotate"),
        (make_items(1, 1), {"revisit": 0}, "revisit"),
    ],
)
def test_a_curriculum_that_cannot_work_is_refused_in_a_sentence(items, args, said):
    with pytest.raises(PivotTraceError, match=said):
        make(items, **args)


def test_observing_a_prompt_that_was_never_given_out_is_refused():
    with pytest.raises(PivotTraceError, match="stranger"):
        make(make_items(1, 1), 2).observe([row("stranger", "annotate", 1.0)])


def test_the_order_of_prompts_is_that_of_earlier_versions():
    routes = "sssasaasaaaaaaasasssssss"
    items = [
        Item(
            i, f"{i * 0x9E3779B97F4A7C15 % 2**64:016x}", "annotate" if r == "a" else "self_train", 0
        )
        for i, r in enumerate(routes)
    ]
    mixed = [15, 13, 23, 12, 0, 3, 17, 8, 22, 9, 18, 1, 6, 2, 10, 20, 11, 4, 16, 7, 14, 21, 5, 19]
    assert take(make(items, 4, seed=3), 29) == [*mixed, 2, 13, 20, 10, 7]
    assert take(make(items, 4, annotate_share=0.6), 8) == [10, 18, 11, 4, 6, 3, 21, 8]
    assert take(make(items, 4, "random", seed=1), 8) == [1, 21, 7, 17, 16, 23, 22, 15]


@quick
@given(st.tuples(st.integers(1, 12), st.integers(1, 12)), bounded, st.integers(0, 40))
def test_a_bounded_share_holds_in_every_batch_and_every_prompt_comes(numbers, spec, skipped):
    annotate, n = numbers[0], sum(numbers)
    curriculum = make(make_items(*numbers), **spec)
    size = spec["batch_size"]
    # At worst one prompt of the longer route comes a batch.
    drawn = take(curriculum, size * (skipped + 2 * n))
    for start in range(0, len(drawn), size):
        share = sum(i < annotate for i in drawn[start : start + size]) / size
        assert spec["min_annotate_share"] - 1e-9 <= share <= spec["max_annotate_share"] + 1e-9
    assert set(drawn) == set(range(n))


def test_a_route_that_a_bound_makes_come_again_is_counted():
    curriculum = make(make_items(2, 8), 4, min_annotate_share=0.5)
    assert [sum(i < 2 for i in take(curriculum, 4)) for _ in range(4)] == [2, 2, 2, 2]
    assert curriculum.metrics()["curriculum/repeated"] >= 4


def test_a_scheduled_share_moves_from_its_start_to_its_end():
    spec = {"annotate_share": 0.0, "annotate_share_end": 1.0, "share_steps": 10}
    curriculum = make(make_items(200, 200), 10, **spec)
    counts = []
    for step in range(1, 21):
        curriculum.begin(step)
        counts.append(sum(i < 200 for i in take(curriculum, 10)))
    assert counts[0] == 0 and counts == sorted(counts) and counts[10:] == [10] * 10


def test_a_schedule_goes_by_training_steps_however_many_prompts_a_step_draws():
    spec = {"annotate_share": 0.0, "annotate_share_end": 1.0, "share_steps": 10}
    shares = []
    for batches in (1, 3):
        curriculum = make(make_items(900, 900), 10, **spec)
        shares.append([])
        for step in range(1, 21):
            curriculum.begin(step)
            n = 10 * batches
            shares[-1].append(sum(i < 900 for i in take(curriculum, n)) / n)
    assert np.abs(np.subtract(*shares)).max() <= 0.1
    resumed = make(make_items(900, 900), 10, **spec)
    resumed.load_state_dict(copy.deepcopy(curriculum.state_dict()))
    assert take(resumed, 10) == take(curriculum, 10)


def move(curriculum, n, chosen, route="self_train", resting=False, uncertainty=0.5):
    """The chosen prompts move, the other stay as `make_items(0, n)` or earlier moves left them."""
    state = curriculum.state_dict()["moved"]
    routes = np.array([curriculum.route_of(f"id{i:03d}") == "annotate" for i in range(n)])
    u = np.linspace(1, 0, n) if state is None else state["uncertainty"]
    rests = np.zeros(n, dtype=bool)
    routes[chosen], rests[chosen], u[chosen] = route == "annotate", resting, uncertainty
    curriculum.update(annotate=routes, resting=rests, uncertainty=u)


@quick
@given(sizes, orders, st.integers(0, 30), st.data())
def test_after_an_update_the_rest_of_the_pass_comes_once_and_a_resumed_run_agrees(
    numbers, spec, before, data
):
    n = sum(numbers)
    curriculum = make(make_items(*numbers), **spec)
    first = take(curriculum, before % n)
    chosen = data.draw(st.lists(st.integers(0, n - 1), unique=True))
    move(curriculum, n, chosen, data.draw(st.sampled_from(["annotate", "self_train"])))
    again = make(make_items(*numbers), **spec)
    again.load_state_dict(copy.deepcopy(curriculum.state_dict()))
    rest = take(curriculum, n - len(first) + n)
    assert sorted([*first, *rest[: n - len(first)]]) == list(range(n))
    assert take(again, len(rest)) == rest


@quick
@given(sizes, orders, st.integers(1, 5))
def test_prompts_at_rest_come_once_in_as_many_passes_as_revisit_says(numbers, spec, revisit):
    n = sum(numbers)
    curriculum = make(make_items(*numbers), **spec, revisit=revisit)
    resting = list(range(0, n, 2))
    move(curriculum, n, resting, resting=True)
    awake = n - len(resting)
    drawn = Counter(take(curriculum, awake * revisit + len(resting)))
    assert all(drawn[i] == (1 if i in resting else revisit) for i in range(n))


def test_an_update_changes_the_order_by_uncertainty_and_the_route():
    curriculum = make(make_items(3, 3), 2, "easy_to_hard")
    assert take(curriculum, 2) == [5, 4]
    move(curriculum, 6, [0], "self_train", uncertainty=0.0)
    assert take(curriculum, 4) == [0, 3, 2, 1]
    assert tuple(map(curriculum.route_of, ("id000", "id001"))) == ("self_train", "annotate")


def test_a_prompt_whose_label_came_is_at_rest_no_more():
    curriculum = make(make_items(0, 6), 2)
    move(curriculum, 6, [2, 3], resting=True)
    curriculum.labelled(["id003"])
    assert curriculum.route_of("id003") == "annotate"
    assert 3 in take(curriculum, 5)


def test_the_reach_is_that_of_the_self_train_prompts_if_an_annotate_prompt_is_within():
    items = [Item(0, "a", "annotate", 0.4), Item(1, "s", "self_train", 0.5)]
    assert make(items).reach() == 0.5
    assert make([Item(0, "a", "annotate", 0.6), items[1]]).reach() == math.inf
    assert make(items[:1]).reach() == math.inf


def draw_batch(curriculum, n, size):
    """A batch, in which a prompt comes twice only if all awake ones of its route are in it."""
    moved, batch = curriculum.state_dict()["moved"], []
    resting = np.zeros(n) if moved is None else np.unpackbits(moved["resting"], count=n)
    routes = [curriculum.route_of(f"id{i:03d}") for i in range(n)]
    for index in islice(curriculum, size):
        if index in batch:
            mates = {i for i in range(n) if routes[i] == routes[index] and not resting[i]}
            assert mates <= set(batch)
        batch.append(index)
    return batch


@quick
@given(st.tuples(st.integers(2, 12), st.integers(2, 12)), bounded, st.data())
def test_bounds_hold_across_updates_and_no_prompt_comes_twice_in_a_batch_without_need(
    numbers, spec, data
):
    n, size = sum(numbers), spec["batch_size"]
    fewest, most = CurriculumConfig(**spec).annotate_bounds()
    curriculum = make(make_items(*numbers), **spec)
    for _ in range(data.draw(st.integers(3, 12))):
        kind = data.draw(st.sampled_from(["nothing", "update", "label", "resume"]))
        if kind == "update":
            # One awake prompt of each route stays.
            annotate, resting = (
                np.array(
                    [first, *data.draw(st.lists(st.booleans(), min_size=n - 2, max_size=n - 2)), 0],
                    bool,
                )
                for first in (True, False)
            )
            curriculum.update(annotate=annotate, resting=resting, uncertainty=np.linspace(1, 0, n))
        elif kind == "label":
            curriculum.labelled([f"id{data.draw(st.integers(0, n - 2)):03d}"])
        elif kind == "resume":
            state = copy.deepcopy(curriculum.state_dict())
            curriculum = make(make_items(*numbers), **spec)
            curriculum.load_state_dict(state)
        batch = draw_batch(curriculum, n, size)
        known = sum(curriculum.route_of(f"id{i:03d}") == "annotate" for i in batch)
        assert fewest <= known <= most


@quick
@given(st.tuples(st.integers(2, 12), st.integers(2, 12)), bounded, st.integers(0, 60), st.data())
def test_after_updates_with_bounds_a_resumed_curriculum_goes_on_the_same(
    numbers, spec, before, data
):
    n = sum(numbers)
    curriculum = make(make_items(*numbers), **spec)
    for _ in range(3):
        take(curriculum, before)
        chosen = data.draw(st.lists(st.integers(0, n - 1), unique=True))
        move(curriculum, n, chosen, data.draw(st.sampled_from(["annotate", "self_train"])))
        take(curriculum, data.draw(st.integers(0, 20)))
    again = make(make_items(*numbers), **spec)
    again.load_state_dict(copy.deepcopy(curriculum.state_dict()))
    assert take(again, 4 * n) == take(curriculum, 4 * n)
    assert again.metrics() == curriculum.metrics()


def test_an_update_that_moves_nothing_leaves_a_route_that_began_again_its_share():
    curriculum = make(make_items(20, 300), 16, min_annotate_share=0.25)
    assert [sum(i < 20 for i in take(curriculum, 16)) for _ in range(8)] == [4] * 8
    move(curriculum, 320, [], uncertainty=0.0)
    assert [sum(i < 20 for i in take(curriculum, 16)) for _ in range(8)] == [4] * 8


def test_a_label_that_arrives_does_not_crowd_out_the_others_of_its_route():
    curriculum = make(make_items(20, 300), 16, min_annotate_share=0.25)
    take(curriculum, 16 * 8)
    curriculum.labelled(["id200"])
    batches = [[i for i in take(curriculum, 16) if i < 20 or i == 200] for _ in range(10)]
    assert all(len(set(batch)) == 4 for batch in batches)
    drawn = Counter(i for batch in batches for i in batch)
    assert drawn[200] <= 3 and len(drawn) == 21


def test_repeats_of_a_route_are_spread_evenly_though_updates_come_every_step():
    curriculum = make(make_items(20, 300), 16, min_annotate_share=0.25)
    drawn = Counter()
    for _ in range(20):
        drawn.update(i for i in take(curriculum, 16) if i < 20)
        move(curriculum, 320, [], uncertainty=0.0)
    assert sum(drawn.values()) == 80 and set(drawn.values()) == {4}


def test_a_bound_gives_way_where_all_prompts_of_a_route_rest():
    curriculum = make(make_items(2, 8), 4, min_annotate_share=0.5, revisit=9)
    move(curriculum, 10, [0, 1], "annotate", resting=True)
    assert [sum(i < 2 for i in take(curriculum, 4)) for _ in range(2)] == [1, 0]


def test_since_is_the_first_step_of_a_prompts_present_route_and_rest():
    curriculum = make(make_items(2, 2), 2)
    curriculum.begin(3)
    assert curriculum.since(["id003"]).tolist() == [0]
    move(curriculum, 4, [2], "annotate", resting=True)
    assert curriculum.since(["id001", "id002"]).tolist() == [0, 4]
    curriculum.begin(7)
    curriculum.labelled(["id002"])
    again = make(make_items(2, 2), 2)
    again.load_state_dict(curriculum.state_dict())
    assert again.since(["id001", "id002"]).tolist() == [0, 7]
