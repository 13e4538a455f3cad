"""Which prompts a budget buys: labels, costs, quotas, floors, priorities."""

import json
import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pivottrace_verl.budget import read_costs
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.triage import Outcome, TriageConfig, triage
from tests.score_table import score_table

quick = settings(deadline=None, max_examples=60)
CFG = TriageConfig(estimator="entropy", draws=10)
N = 100
IDS = [f"{i:03d}" for i in range(N)]
SOURCES = ["even" if i % 2 == 0 else "odd" for i in range(N)]
BOUGHT_REASONS = ("votes not trusted", "uncertainty unknown: no rollout was traced")


def scores():
    """Prompt i is the harder the larger i."""
    hard = [float(i) for i in range(N)]
    return score_table(IDS, {"uncertainty/entropy": hard, "length_mean": [1.0] * N})


def probes():
    """Every fifth prompt; votes lose trust from about the middle on."""
    return [Outcome(IDS[i], 1 - i / N, i < N / 2) for i in range(0, N, 5)]


def planned(owned=(), **options):
    known = {name: options.pop(name) for name in ("costs", "spent") if name in options}
    cfg = replace(CFG, **options)
    return triage(scores(), probes(), owned, cfg, sources=pa.array(SOURCES), **known)


def bought(plan):
    return [int(pt_id) for pt_id in plan.to_buy()]


def reasons(plan):
    return dict(zip(IDS, plan.rows["reason"].to_pylist(), strict=True))


# Budgets


def test_a_budget_of_costs_counts_what_was_spent_and_buys_no_more_than_is_left():
    costs = np.where(np.arange(N) % 2, 3.0, 1.0)
    plan = planned(owned=["001"], budget_cost=20.0, costs=costs, spent=3.5)
    assert plan.labels["spent"] == 3.5
    assert plan.labels["cost_to_buy"] <= 16.5
    assert plan.labels["cost_to_buy"] == sum(costs[bought(plan)])
    cheapest_left_out = min(costs[i] for i in range(N) if "over budget" in reasons(plan)[IDS[i]])
    assert plan.labels["cost_to_buy"] + cheapest_left_out > 16.5


def test_a_prompt_that_is_too_dear_is_passed_over_for_the_next():
    costs = np.ones(N)
    costs[99] = 50.0
    assert bought(planned(budget_cost=3.0, costs=costs)) == [98, 97, 96]


def test_tenths_are_bought_to_the_last():
    assert len(bought(planned(budget_cost=0.3, costs=np.full(N, 0.1)))) == 3


def test_unit_costs_make_both_budgets_the_same():
    owned = IDS[:7]
    labels, costs = planned(owned, budget=20), planned(owned, budget_cost=20.0)
    assert labels.rows.equals(costs.rows)


def test_the_cost_of_each_label_is_in_the_plan():
    costs = np.arange(N) / 4
    assert planned(costs=costs).rows["cost"].to_pylist() == costs.tolist()


# Priorities


def test_cheapest_buys_most_uncertainty_for_its_cost_and_free_labels_first():
    costs = np.where(np.arange(N) < 90, 1.0, 10.0)
    costs[60] = 0.0
    assert sorted(bought(planned(budget=3, costs=costs, priority="cheapest"))) == [60, 88, 89]


def test_random_is_seeded_spread_out_and_does_not_move_when_labels_arrive():
    plan = planned(budget=20, priority="random")
    assert bought(planned(budget=20, priority="random")) == bought(plan)
    assert bought(planned(budget=20, priority="random", seed=1)) != bought(plan)
    assert bought(plan) != bought(planned(budget=20))
    half = [IDS[i] for i in bought(plan)[:10]]
    after = planned(half, budget=20, priority="random")
    assert set(bought(after)) == set(bought(plan)) - {int(i) for i in half}


# Quotas and floors


def test_a_quota_caps_a_source_bought_labels_included():
    owned = ["099", "097", "001"]
    plan = planned(owned, quotas={"odd": 5})
    assert bought(plan)[:4] == [98, 96, 95, 94]
    assert [i for i in bought(plan) if i % 2] == [95, 93]
    assert reasons(plan)["091"] == "over its source's quota: votes not trusted"
    assert plan.labels["over_quota"] == sum("quota" in r for r in reasons(plan).values())
    (row,) = plan.sources
    assert (row["source"], row["quota"], row["bought"], row["to_buy"]) == ("odd", 5, 3, 2)


def test_a_floor_is_bought_first_and_the_rest_by_priority():
    plan = planned(budget=10, priority="threshold", floors={"odd": 7})
    assert sum(i % 2 for i in bought(plan)) >= 7
    free = planned(budget=10, priority="threshold")
    assert sum(i % 2 for i in bought(free)) == 5
    least = min(bought(free))
    assert min(bought(plan)) == least


def test_labels_that_are_owned_count_towards_a_floor():
    plan = planned(["099", "097"], budget=4, floors={"odd": 3})
    assert bought(plan) == [98, 95]


def test_a_source_with_too_few_prompts_for_its_floor_is_said():
    plan = planned(floors={"odd": 90})
    available = sum(i % 2 for i in bought(planned()))
    assert plan.notes == [
        f"The source 'odd' has {available} prompts to annotate and 0 labels, fewer than its floor "
        "of 90."
    ]


@quick
@given(
    st.none() | st.integers(0, 60),
    st.dictionaries(st.sampled_from(["even", "odd"]), st.integers(0, 30)),
    st.dictionaries(st.sampled_from(["even", "odd"]), st.integers(0, 15)),
    st.sampled_from(["uncertain", "threshold", "cheapest", "random"]),
    st.sets(st.sampled_from(IDS), max_size=20),
    st.integers(0, 9),
)
def test_no_plan_breaks_a_limit_or_loses_a_prompt(budget, quotas, floors, priority, owned, seed):
    costs = np.random.default_rng(seed).choice([0.0, 0.5, 1.0, 4.0], size=N)
    money = None if budget is None else budget / 2
    try:
        plan = planned(
            owned,
            budget_cost=money,
            quotas=quotas,
            floors=floors,
            priority=priority,
            costs=costs,
        )
    except PivotTraceError as error:
        assert "floor" in str(error)
        return
    chosen = bought(plan)
    wanted = [i for i, r in enumerate(reasons(plan).values()) if "not trusted" in r]
    assert not {IDS[i] for i in wanted} & owned
    if money is not None:
        assert sum(costs[chosen]) <= max(0.0, money - plan.labels["spent"]) + 1e-9
    for source, remainder in (("even", 0), ("odd", 1)):
        have = sum(int(i) % 2 == remainder for i in owned)
        new = sum(i % 2 == remainder for i in chosen)
        assert new == 0 or have + new <= quotas.get(source, math.inf)
        possible = sum(i % 2 == remainder for i in wanted)
        assert new >= min(possible, floors.get(source, 0) - have)
    if money is None and not quotas:
        assert sorted(chosen) == wanted
    assert plan.labels["to_buy"] + plan.labels["over_budget"] + plan.labels["over_quota"] == len(
        wanted
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"budget": 3, "budget_cost": 3.0}, "only one of them"),
        ({"budget_cost": math.nan}, "nan"),
        ({"budget_cost": math.inf}, "inf"),
        ({"budget_cost": -0.5}, "-0.5"),
        ({"quotas": {"odd": -1}}, "quota of the source 'odd' is -1"),
        ({"floors": {"odd": -1}}, "floor of the source 'odd' is -1"),
        ({"floors": {"odd": 4}, "quotas": {"odd": 3}}, "floor of 4 labels, more than its quota"),
        ({"floors": {"odd": 4, "even": 4}, "budget": 7}, "add up to 8 labels"),
        ({"floors": {"odd": 4}, "budget_cost": 2.0}, "need 4 more labels that cost 4"),
        ({"quotas": {"gsm": 4}}, "'gsm', which has a quota; the pool's sources are 'even', 'odd'"),
        ({"floors": {"gsm": 4}}, "'gsm', which has a floor"),
        ({"max_truncated": 1.5}, "1.5"),
        ({"max_unanswered": math.nan}, "nan"),
        ({"draws": 0}, "0 bootstrap draws"),
    ],
)
def test_budgets_that_cannot_be_kept_are_one_sentence(options, said):
    with pytest.raises(PivotTraceError, match=said) as error:
        planned(**options)
    assert str(error.value).count("\n") == 0 and str(error.value).endswith(".")


def test_floors_that_the_bought_labels_leave_no_money_for_are_refused():
    with pytest.raises(PivotTraceError, match="only 0 labels are left"):
        planned([i for i, s in zip(IDS, SOURCES, strict=True) if s == "even"], budget=10,
                floors={"odd": 4})  # fmt: skip


# Files of costs


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_costs_are_read_from_three_formats_and_are_1_where_none_is_named(tmp_path, suffix):
    path = tmp_path / f"costs.{suffix}"
    rows = [{"pt_id": "002", "cost": 0.5}, {"pt_id": "000", "cost": 3}]
    if suffix == "csv":
        path.write_text("pt_id,cost\n002,0.5\n000,3\n")
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    assert read_costs(path, pa.array(IDS[:4])).tolist() == [3.0, 1.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("pt_id,cost\n000,-1\n", "1 costs .* 000"),
        ("pt_id,cost\n000,nan\n001,inf\n", "2 costs"),
        ("pt_id,cost\n000,much\n", "1 costs"),
        ("pt_id,cost\n000,\n", "1 costs"),
        ("pt_id,cost\nstranger,1\n", "not in the pool .*stranger"),
        ("pt_id,cost\n000,1\n000,1\n", "000 more than once"),
        ("pt_id,price\n000,1\n", "no column cost"),
        ('{"pt_id": "000", "cost": true}', "1 costs"),
        ('{"pt_id": "000", "cost": NaN}', "1 costs"),
        ('{"pt_id": "000", "cost": 1e999}', "1 costs"),
        ('{"pt_id": "\\ud800", "cost": 1}', "Unicode"),
        ('{"pt_id": "000"}', "no cost"),
    ],
)
def test_a_bad_file_of_costs_is_refused_in_one_sentence(tmp_path, content, said):
    path = tmp_path / ("c.jsonl" if content.startswith("{") else "c.csv")
    path.write_text(content)
    with pytest.raises(PivotTraceError, match=said):
        read_costs(path, pa.array(IDS))


def test_a_parquet_file_of_costs_with_other_columns_or_kinds_is_refused(tmp_path):
    path = tmp_path / "c.parquet"
    for table, said in (
        ({"id": ["000"]}, "no column pt_id, cost; its columns are id"),
        ({"pt_id": ["000"], "cost": ["dear"]}, "no file of costs"),
        ({"pt_id": ["000"], "cost": [None]}, "1 costs"),
    ):
        pq.write_table(pa.table(table), path)
        with pytest.raises(PivotTraceError, match=said):
            read_costs(path, pa.array(IDS))
