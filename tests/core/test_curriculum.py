"""The curriculum's promises, for any mix of routes."""

import json
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pivottrace_verl.curriculum import ORDERS, Curriculum, Item
from pivottrace_verl.errors import PivotTraceError

quick = settings(deadline=None, max_examples=80)


def make_items(annotate, self_train, first=0):
    routes = ["annotate"] * annotate + ["self_train"] * self_train
    n = len(routes)
    return [
        Item(first + i, f"id{i:03d}", route, uncertainty=1 - i / max(1, n - 1))
        for i, route in enumerate(routes)
    ]


def take(curriculum, n):
    return list(islice(curriculum, n))


curricula = st.fixed_dictionaries(
    {
        "sizes": st.tuples(st.integers(0, 12), st.integers(0, 12)).filter(any),
        "batch_size": st.integers(1, 9),
        "order": st.sampled_from(ORDERS),
        "seed": st.integers(0, 2**40),
        "annotate_share": st.none() | st.floats(0, 1),
    }
)


def make(spec):
    return Curriculum(make_items(*spec["sizes"]), **{k: v for k, v in spec.items() if k != "sizes"})


@quick
@given(curricula, st.integers(1, 3))
def test_every_prompt_comes_exactly_once_a_pass(spec, passes):
    n = sum(spec["sizes"])
    drawn = take(make(spec), n * passes)
    for k in range(passes):
        assert sorted(drawn[k * n : (k + 1) * n]) == list(range(n))


@quick
@given(curricula, st.integers(0, 60), st.integers(1, 60))
def test_a_resumed_curriculum_goes_on_as_an_uninterrupted_one(spec, before, after):
    whole = make(spec)
    expected = take(whole, before + after)[before:]
    killed = make(spec)
    take(killed, before)
    killed.observe([{"pt_id": "id000", "reward": 1.0, "agreement": None}])
    state = json.loads(json.dumps(killed.state_dict()))
    resumed = make(spec)
    resumed.load_state_dict(state)
    assert resumed.metrics() == killed.metrics()
    assert take(resumed, after) == expected


@quick
@given(curricula)
def test_the_order_of_the_items_given_does_not_matter(spec):
    items = make_items(*spec["sizes"])
    args = {k: v for k, v in spec.items() if k != "sizes"}
    assert take(Curriculum(items, **args), 40) == take(Curriculum(items[::-1], **args), 40)


@quick
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 99), st.data())
def test_every_stretch_of_a_mixed_pass_holds_the_routes_in_proportion(a, s, seed, data):
    start = data.draw(st.integers(0, a + s - 1))
    length = data.draw(st.integers(1, a + s - start))
    drawn = take(Curriculum(make_items(a, s), 4, seed=seed), a + s)[start : start + length]
    labelled = sum(index < a for index in drawn)
    assert abs(labelled - length * a / (a + s)) <= 2


def test_annotate_share_sets_each_batch_until_a_route_runs_out():
    drawn = take(Curriculum(make_items(10, 30), 4, annotate_share=0.5), 40)
    batches = [sum(i < 10 for i in drawn[k : k + 4]) for k in range(0, 40, 4)]
    assert batches == [2, 2, 2, 2, 2, 0, 0, 0, 0, 0]


def test_easy_to_hard_and_uncertainty_first_follow_the_uncertainty_every_pass():
    items = make_items(3, 3)
    assert take(Curriculum(items, 2, "easy_to_hard"), 12) == [5, 4, 3, 2, 1, 0] * 2
    assert take(Curriculum(items, 2, "uncertainty_first"), 12) == [0, 1, 2, 3, 4, 5] * 2


@pytest.mark.parametrize("order", ["mixed", "random"])
def test_passes_and_seeds_differ_where_the_order_is_drawn(order):
    drawn = take(Curriculum(make_items(15, 15), 4, order, seed=1), 60)
    assert drawn[:30] != drawn[30:]
    assert drawn[:30] != take(Curriculum(make_items(15, 15), 4, order, seed=2), 30)


def test_data_set_indices_are_given_out_whatever_they_are():
    assert sorted(take(Curriculum(make_items(2, 2, first=100), 2), 4)) == [100, 101, 102, 103]


def test_metrics_count_what_was_drawn_and_show_the_latest_step_by_route():
    curriculum = Curriculum(make_items(2, 2), 2)
    take(curriculum, 6)
    curriculum.observe([{"pt_id": "id000", "reward": 0.0, "agreement": 0.1}])
    curriculum.observe(
        [
            {"pt_id": "id000", "reward": 1.0, "agreement": None},
            {"pt_id": "id001", "reward": 0.0},
            {"pt_id": "id003", "reward": 1.0, "agreement": 0.75},
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
        Curriculum(make_items(3, 2), 2),
        Curriculum(make_items(2, 3), 2, seed=1),
        Curriculum(make_items(2, 3), 3),
        Curriculum(make_items(2, 3), 2, "random"),
        Curriculum(make_items(2, 3), 2, annotate_share=0.5),
    ],
)
def test_a_state_of_other_items_or_settings_is_refused_and_both_are_named(other):
    curriculum = Curriculum(make_items(2, 3), 2)
    take(other, 3)
    state = other.state_dict()
    with pytest.raises(PivotTraceError) as error:
        curriculum.load_state_dict(state)
    assert state["fingerprint"] in str(error.value)
    assert curriculum.state_dict()["fingerprint"] in str(error.value)
    assert curriculum.state_dict()["position"] == 0


def test_a_state_of_an_unknown_format_or_place_is_refused():
    curriculum = Curriculum(make_items(2, 3), 2)
    for change in ({"format": 2}, {"position": 6}, {"pass": -1}):
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
        (make_items(1, 1), {"batch_size": 0}, "batch size"),
        (make_items(1, 1), {"annotate_share": 1.5}, "1.5"),
    ],
)
def test_a_curriculum_that_cannot_work_is_refused_in_a_sentence(items, args, said):
    with pytest.raises(PivotTraceError, match=said):
        Curriculum(items, **{"batch_size": 2, **args})


def test_observing_a_prompt_that_was_never_given_out_is_refused():
    with pytest.raises(PivotTraceError, match="stranger"):
        Curriculum(make_items(1, 1), 2).observe([{"pt_id": "stranger", "reward": 1.0}])
