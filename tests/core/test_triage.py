"""Ranks, probes, the calibration curve and the routes."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.ranking import auroc
from pivottrace_verl.triage import (
    Outcome,
    TriageConfig,
    Uninformative,
    calibrate,
    choose_probes,
    default_probes,
    estimator_table,
    outcomes,
    rank01,
    triage,
    uncertainty,
)
from tests.score_table import score_row, score_table

quick = settings(deadline=None, max_examples=60)
CFG = TriageConfig(estimator="entropy")


def make_pool(n=200, noise=0.0, flip=False):
    """Prompt i is the harder the larger i: pass rate falls from 1 to 0, entropy rises.
    Length and pivots say nothing."""
    rng = np.random.default_rng(0)
    rows, truth = [], {}
    for i in range(n):
        hard = min(1.0, max(0.0, i / (n - 1) + noise * rng.normal()))
        right = round(8 * (1 - hard))
        answers = sorted([("yes", right), ("no", 8 - right)], key=lambda a: -a[1])
        entropy = (n - i if flip else i) / n
        row = score_row(
            f"id{i:04d}",
            [a for a in answers if a[1]],
            **{
                "majority": None if right == 4 else answers[0][0],
                "uncertainty/entropy": entropy,
                "uncertainty/consistency": 1 - abs(2 * hard - 1),
                "uncertainty/length": float(rng.normal()),
                "uncertainty/random": float(rng.random()),
                "uncertainty/pivot_count": float(rng.normal()),
                "length_mean": float(rng.normal()),
            },
        )
        rows.append(row)
        truth[row["pt_id"]] = "yes"
    return rows, truth


def make_probes(rows, truth, n=64, estimator="entropy"):
    u = uncertainty(rows, estimator)
    ids = choose_probes(list(u.values()), list(u), n, seed=0)
    return outcomes(rows, {i: truth[i] for i in ids}, "exact")


def rows_of(plan):
    return plan.rows.to_pylist()


def route_of(plan):
    return dict(zip(plan.rows["pt_id"].to_pylist(), plan.rows["route"].to_pylist(), strict=True))


# Ranks and probes


def test_ranks_run_from_0_to_1_and_ties_are_broken_by_id():
    assert rank01([3.0, 1.0, 1.0], ["c", "b", "a"]).tolist() == [1.0, 0.5, 0.0]


def test_an_unknown_value_ranks_as_most_uncertain_in_either_direction():
    rows = [
        score_row(i, **{"uncertainty/entropy": v}) for i, v in [("a", None), ("b", 1), ("c", 2)]
    ]
    assert uncertainty(rows, "entropy") == {"a": 1.0, "b": 0.0, "c": 0.5}
    assert uncertainty(rows, "entropy", "lower") == {"a": 1.0, "b": 0.5, "c": 0.0}


@quick
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_ranks_do_not_depend_on_the_order_of_the_rows(values, rng):
    ids = [f"{i:03d}" for i in range(len(values))]
    pairs = list(zip(ids, values, strict=True))
    rng.shuffle(pairs)
    there = dict(zip([i for i, _ in pairs], rank01([v for _, v in pairs], [i for i, _ in pairs])))  # noqa: B905
    here = dict(zip(ids, rank01(values, ids), strict=True))
    assert here == there
    for a in range(len(values)):
        for b in range(len(values)):
            assert not values[a] < values[b] or here[ids[a]] < here[ids[b]]


@quick
@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 5))
def test_probes_are_distinct_and_one_comes_from_each_stretch_of_the_ranking(n_pool, n, seed):
    n = min(n, n_pool)
    ids = [f"{i:03d}" for i in range(n_pool)]
    u = np.linspace(0, 1, n_pool)
    chosen = choose_probes(u, ids, n, seed)
    assert len(set(chosen)) == n
    assert chosen == sorted(chosen)
    stretches = np.array_split(np.arange(n_pool), n)
    assert all(int(c) in s for c, s in zip(chosen, stretches, strict=True))
    assert choose_probes(u[::-1], ids[::-1], n, seed) == chosen


def test_another_seed_draws_other_probes():
    ids = [str(i) for i in range(100)]
    draws = {tuple(choose_probes(np.arange(100), ids, 20, seed)) for seed in range(5)}
    assert len(draws) == 5


def test_too_many_probes_are_refused():
    for n in (0, 4):
        with pytest.raises(PivotTraceError, match=f"{n} probes"):
            choose_probes([0.0, 0.5, 1.0], ["a", "b", "c"], n, 0)


def test_the_default_is_64_or_2_percent_of_the_pool():
    assert [default_probes(n) for n in (10, 512, 10_000)] == [10, 64, 200]


# Outcomes and the table


def test_an_outcome_counts_equal_answers_over_all_rollouts():
    row = score_row("a", [("1+2", 3), ("2+2", 2)], unparseable=3, n_rollouts=8)
    found = outcomes([row], {"a": "2+1"}, "expression")
    assert found == [Outcome("a", pass_rate=3 / 8, majority_right=True)]


def test_a_prompt_without_a_majority_is_not_right():
    row = score_row("a", [("x", 4), ("y", 4)], majority=None)
    assert outcomes([row], {"a": "x"}, "exact") == [Outcome("a", 0.5, False)]


def test_a_label_of_a_prompt_that_is_not_scored_is_refused():
    with pytest.raises(PivotTraceError, match="stranger"):
        outcomes([score_row("a")], {"stranger": "1"}, "exact")


@quick
@given(
    st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=30).filter(
        lambda rows: len({b for _, b in rows}) == 2
    )
)
def test_auroc_is_the_chance_that_a_positive_scores_higher(rows):
    positives = [s for s, b in rows if b]
    negatives = [s for s, b in rows if not b]
    wins = sum((p > n) + 0.5 * (p == n) for p in positives for n in negatives)
    expected = wins / (len(positives) * len(negatives))
    assert auroc([s for s, _ in rows], [b for _, b in rows]) == pytest.approx(expected)


def test_the_table_ranks_estimators_and_shows_a_flipped_direction():
    rows, truth = make_pool()
    for row in rows:
        row["uncertainty/pivot_density"] = -row["uncertainty/entropy"]
    table = {r["estimator"]: r for r in estimator_table(rows, make_probes(rows, truth))}
    assert table["entropy"]["auroc"] == 1.0
    assert table["entropy"]["auroc_within_length"] == 1.0
    assert table["entropy"]["direction"] == "higher"
    assert table["pivot_density"]["auroc"] == 0.0
    assert table["pivot_density"]["direction"] == "lower"
    assert abs(table["random"]["auroc"] - 0.5) < 0.25
    assert list(table)[:2] == ["entropy", "pivot_density"]


def test_an_estimator_that_only_measures_length_is_chance_within_length_terciles():
    rng = np.random.default_rng(1)
    rows, probes = [], []
    for i in range(300):
        tier = i % 3
        row = score_row(f"{i:03d}", length_mean=tier + 0.01 * rng.random())
        rows.append({**row, "uncertainty/length": row["length_mean"]})
        probes.append(Outcome(row["pt_id"], 1 - tier / 2, bool(rng.random() > 0.1 + 0.4 * tier)))
    table = {r["estimator"]: r for r in estimator_table(rows, probes)}
    assert table["length"]["auroc"] > 0.7
    assert abs(table["length"]["auroc_within_length"] - 0.5) < 0.1


def test_numbers_that_do_not_exist_are_none_in_the_table():
    probes = [Outcome("a", 1.0, True), Outcome("b", 1.0, True)]
    for row in estimator_table([score_row("a"), score_row("b")], probes):
        assert row["auroc"] is row["spearman"] is row["direction"] is None
    json.dumps(estimator_table([score_row("a")], probes), allow_nan=False)


# The curve


def test_thresholds_lie_where_a_known_curve_crosses_them():
    u = np.linspace(0, 1, 1001)
    curve = calibrate(u, 1 - u, 1 - u, window=0.001)
    assert curve.window == 1
    assert curve.u_low == pytest.approx(0.1, abs=2e-3)
    assert curve.u_high == pytest.approx(0.3, abs=2e-3)


def test_the_window_is_a_share_of_the_probes_cut_off_at_the_ends():
    curve = calibrate([0.3, 0.1, 0.2, 0.0], [1, 0, 1, 0], [1, 1, 0, 0], window=0.75)
    assert curve.window == 3
    assert curve.u == [0.0, 0.1, 0.2, 0.3]
    assert curve.p == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert curve.m == pytest.approx([0.5, 1 / 3, 2 / 3, 0.5])


def test_a_policy_that_masters_everything_has_no_u_high_and_one_that_fails_no_u_low():
    u = np.linspace(0, 1, 20)
    good = calibrate(u, np.ones(20), np.ones(20))
    assert (good.u_low, good.u_high) == (1.0, None)
    bad = calibrate(u, np.zeros(20), np.zeros(20))
    assert (bad.u_low, bad.u_high) == (None, 0.0)


def test_a_late_bump_of_luck_does_not_drop_the_hard_prompts():
    u = np.linspace(0, 1, 40)
    p = np.where(u < 0.2, 1.0, 0.2)
    p[-3:] = 1.0
    curve = calibrate(u, p, p > 0.5, window=0.05)
    assert curve.u_low < 0.25


def test_a_mean_that_equals_the_threshold_counts_as_reached():
    curve = calibrate([0, 0.5, 1], [0.9, 0.9, 0.9], [0.7, 0.7, 0.7], window=1.0)
    assert (curve.u_low, curve.u_high) == (1.0, None)


@quick
@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.booleans()), min_size=1, max_size=40),
    st.floats(0.05, 1.0),
)
def test_u_low_never_lies_above_u_high_and_the_curves_fall(probes, window):
    u, p, m = (np.array(column) for column in zip(*probes, strict=True))
    curve = calibrate(u, p, m, window=window)
    assert (np.diff(curve.p_monotone) <= 1e-12).all()
    assert (np.diff(curve.m_monotone) <= 1e-12).all()
    if curve.u_low is not None and curve.u_high is not None:
        assert curve.u_low <= curve.u_high


# Routes


def test_the_certain_are_dropped_the_middle_votes_and_the_uncertain_are_annotated():
    rows, truth = make_pool()
    plan = triage(rows, make_probes(rows, truth), [], CFG)
    routes = [row["route"] for row in rows_of(plan)]
    assert routes == sorted(routes, key=["drop", "self_train", "annotate"].index)
    assert set(routes) == {"drop", "self_train", "annotate"}
    assert plan.counts() == {
        r: routes.count(r) for r in ("annotate", "self_train", "drop", "review")
    }
    assert plan.spearman < -0.9
    assert [row["rank"] for row in rows_of(plan)] == list(range(200, 0, -1))
    assert rows_of(plan)[-1]["uncertainty"] == 1.0


@quick
@given(
    st.integers(0, 2**32),
    st.floats(0, 0.4),
    st.floats(0.1, 0.9),
    st.floats(0.5, 0.95),
    st.none() | st.integers(0, 120),
    st.sampled_from(["drop", "self_train"]),
)
def test_of_two_unlabelled_prompts_the_more_uncertain_never_gets_the_easier_route(
    seed, noise, trusted, mastered, budget, overflow
):
    rng = np.random.default_rng(seed)
    names = [f"{i:03d}" for i in range(100)]
    hard = [i + 100 * noise * rng.normal() for i in range(100)]
    scores = score_table(names, {"uncertainty/entropy": hard})
    probes = [Outcome(n, p := 1 - i / 99, p > 0.5) for i, n in enumerate(names) if i % 3 == 0]
    cfg = replace(
        CFG, trusted=trusted, mastered=mastered, budget=budget, overflow=overflow, alpha=1.0
    )
    owned = {o.pt_id for o in probes}
    plan = triage(scores, probes, owned, cfg)
    backwards = scores.take(list(reversed(range(100))))
    assert rows_of(triage(backwards, probes[::-1], owned, cfg)) == rows_of(plan)[::-1]
    fresh = sorted(
        (r for r in rows_of(plan) if r["pt_id"] not in owned), key=lambda r: r["uncertainty"]
    )
    level = {"mastered": 0, "votes trusted": 1, "over budget: votes not trusted": 2}
    levels = [level.get(row["reason"], 3) for row in fresh]
    assert levels == sorted(levels)
    assert all(
        (row["reason"] == "votes not trusted") == (row["route"] == "annotate") for row in fresh
    )
    if budget is not None:
        assert plan.labels["bought"] + plan.labels["to_buy"] <= max(budget, len(owned))
    assert len(plan.to_buy()) == plan.labels["to_buy"]


def test_a_flipped_estimator_gives_the_same_routes_because_the_probes_decide():
    rows, truth = make_pool()
    flipped, _ = make_pool(flip=True)
    probes = make_probes(rows, truth)
    plan, other = triage(rows, probes, [], CFG), triage(flipped, probes, [], CFG)
    assert (plan.direction, other.direction) == ("higher", "lower")
    assert route_of(plan) == route_of(other)


def test_labels_bought_as_probes_count_against_the_budget_and_are_used():
    rows, truth = make_pool()
    probes = make_probes(rows, truth)
    owned = {o.pt_id for o in probes}
    plan = triage(rows, probes, owned, replace(CFG, budget=80))
    assert (plan.labels["bought"], plan.labels["to_buy"]) == (64, 16)
    assert plan.labels["spent"] + plan.labels["cost_to_buy"] == 80
    assert plan.labels["over_budget"] > 0
    for row in rows_of(plan):
        if row["pt_id"] in owned:
            assert row["route"] == "drop" or row["reason"] == "labelled already"
            assert row["route"] in ("annotate", "drop")
    bought_now = [r for r in rows_of(plan) if r["reason"] == "votes not trusted"]
    left_out = [r for r in rows_of(plan) if r["reason"] == "over budget: votes not trusted"]
    assert min(r["uncertainty"] for r in bought_now) > max(r["uncertainty"] for r in left_out)
    assert {r["route"] for r in left_out} == {"drop"}
    assert plan.to_buy() == [r["pt_id"] for r in sorted(bought_now, key=lambda r: r["rank"])]
    kept = triage(rows, probes, owned, replace(CFG, budget=80, overflow="self_train"))
    assert {route_of(kept)[r["pt_id"]] for r in left_out} == {"self_train"}


def test_priority_threshold_buys_the_prompts_nearest_the_threshold():
    rows, truth = make_pool()
    probes = make_probes(rows, truth)
    cfg = replace(CFG, budget=60)
    top, near = (
        triage(rows, probes, [], replace(cfg, priority=p)) for p in ("uncertain", "threshold")
    )

    def bought(plan):
        return sorted(r["uncertainty"] for r in rows_of(plan) if r["reason"] == "votes not trusted")

    assert len(bought(top)) == len(bought(near)) == 60
    assert bought(top)[-1] == 1.0
    assert bought(near)[0] == min(u for u in bought(triage(rows, probes, [], CFG)))
    assert bought(near)[-1] < bought(top)[-1]


def test_a_budget_already_spent_buys_nothing_more():
    rows, truth = make_pool()
    probes = make_probes(rows, truth)
    plan = triage(rows, probes, {o.pt_id for o in probes}, replace(CFG, budget=10))
    assert plan.labels["to_buy"] == 0
    assert plan.labels["bought"] == 64


def test_routes_do_not_move_when_the_queue_has_been_labelled():
    rows, truth = make_pool()
    probes = make_probes(rows, truth)
    owned = {o.pt_id for o in probes}
    before = triage(rows, probes, owned, replace(CFG, budget=90))
    after = triage(rows, probes, owned | set(before.to_buy()), replace(CFG, budget=90))
    assert route_of(before) == route_of(after)
    assert after.to_buy() == []


def test_a_prompt_that_was_never_traced_is_annotated_and_says_so():
    rows, truth = make_pool()
    rows[0]["uncertainty/entropy"] = math.nan
    plan = triage(rows, make_probes(rows[1:], truth), [], CFG)
    assert rows_of(plan)[0]["route"] == "annotate"
    assert "unknown" in rows_of(plan)[0]["reason"]
    assert plan.to_buy()[0] == "id0000"


def test_a_prompt_that_was_never_traced_is_not_mastered_with_the_rest():
    rows, truth = make_pool()
    probes = [replace(o, pass_rate=0.9 + o.pass_rate / 20) for o in make_probes(rows, truth)]
    probes = [replace(o, majority_right=True) for o in probes]
    owned = next(o.pt_id for o in probes if o.pt_id != "id0000")
    rows[0]["uncertainty/entropy"] = math.nan
    plan = triage(rows, [o for o in probes if o.pt_id != "id0000"], [owned], CFG)
    assert plan.counts() == {"annotate": 1, "self_train": 0, "drop": 199, "review": 0}
    assert plan.to_buy() == ["id0000"]
    assert {r["reason"] for r in rows_of(plan) if r["pt_id"] == owned} == {
        "mastered; its label was bought already"
    }


# Refusals


def test_an_estimator_that_says_nothing_is_refused_and_the_one_that_serves_is_named():
    rows, truth = make_pool()
    probes = make_probes(rows, truth)
    for row in rows:
        row["uncertainty/pivot_count"] = 0.0
    with pytest.raises(Uninformative) as error:
        triage(rows, probes, [], TriageConfig(estimator="pivot_count"))
    assert error.value.best == "entropy"
    assert "pivot_count" in str(error.value)
    assert "'entropy'" in str(error.value)
    assert {row["estimator"] for row in error.value.table} >= {"entropy", "pivot_count"}


def test_a_direction_that_the_probes_contradict_is_refused():
    rows, truth = make_pool()
    with pytest.raises(Uninformative, match="lower"):
        triage(rows, make_probes(rows, truth), [], replace(CFG, direction="lower"))


def test_auto_takes_the_estimator_the_probes_follow_but_never_random():
    rows, truth = make_pool()
    probes = make_probes(rows, truth)
    assert triage(rows, probes, [], replace(CFG, estimator="auto")).estimator == "entropy"
    rates = {o.pt_id: o.pass_rate for o in probes}
    for row in rows:
        for name in [n for n in row if n.startswith("uncertainty/")]:
            row[name] = 0.5
        row["uncertainty/random"] = 1 - rates.get(row["pt_id"], 0.0)
    with pytest.raises(Uninformative, match="No estimator") as error:
        triage(rows, probes, [], replace(CFG, estimator="auto"))
    assert error.value.best is None


def test_probes_that_all_came_out_alike_are_refused():
    rows, _ = make_pool()
    probes = [Outcome(row["pt_id"], 1.0, True) for row in rows[:64]]
    with pytest.raises(Uninformative, match="same pass rate"):
        triage(rows, probes, [], CFG)


def test_too_few_probes_and_unknown_estimators_are_refused():
    rows, truth = make_pool()
    with pytest.raises(PivotTraceError, match="Only 7 probes"):
        triage(rows, make_probes(rows, truth, n=7), [], CFG)
    with pytest.raises(PivotTraceError, match="mood"):
        triage(rows, make_probes(rows, truth), [], replace(CFG, estimator="mood"))
    with pytest.raises(PivotTraceError, match="mood"):
        uncertainty(rows, "mood")


@pytest.mark.parametrize(
    "bad",
    [
        {"mastered": 0.0},
        {"trusted": 1.2},
        {"window": 0.0},
        {"direction": "up"},
        {"overflow": "keep"},
        {"budget": -1},
        {"priority": "loudest"},
        {"alpha": 0.0},
    ],
)
def test_settings_that_cannot_be_meant_are_refused(bad):
    with pytest.raises(PivotTraceError, match=str(next(iter(bad.values())))):
        TriageConfig(**bad)


def test_the_plan_is_json_and_its_table_adds_up():
    rows, truth = make_pool()
    plan = triage(rows, make_probes(rows, truth), [], replace(CFG, budget=20))
    info = json.loads(json.dumps(plan.info(), allow_nan=False))
    assert info["routes"] == plan.counts()
    assert info["curve"]["u_low"] == plan.curve.u_low
    table = plan.route_rows()
    assert sum(row["prompts"] for row in table) == 200
    assert sum(row["share"] for row in table) == pytest.approx(1.0)
