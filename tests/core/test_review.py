"""Broken is not hard: prompts whose rollouts cannot be judged are set apart."""

from dataclasses import replace

import pytest

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.triage import Outcome, TriageConfig, triage
from tests.score_table import score_table

CFG = TriageConfig(estimator="entropy", draws=10)
N = 60
IDS = [f"{i:03d}" for i in range(N)]


def scores(broken=(), **counts):
    """Prompt i is the harder the larger i; `counts` are columns of the prompts `broken`."""
    columns = {"uncertainty/entropy": [float(i) for i in range(N)], "length_mean": [1.0] * N}
    columns |= {
        name: [count if i in broken else 0 for i in range(N)] for name, count in counts.items()
    }
    return score_table(IDS, columns)


def probes(wrong_from=30):
    return [Outcome(IDS[i], 1 - i / N, i < wrong_from) for i in range(0, N, 2)]


def entry(plan, i):
    return plan.rows.slice(i, 1).to_pylist()[0]


@pytest.mark.parametrize(
    ("counts", "reason"),
    [
        ({"unparseable": 5}, "broken: too many rollouts unparseable"),
        ({"truncated": 5}, "broken: too many rollouts truncated"),
        ({"timed_out": 5}, "broken: too many answers timed out"),
        ({"truncated": 5, "unparseable": 8}, "broken: too many rollouts truncated"),
        ({"unparseable": 2, "timed_out": 3}, "broken: too many answers timed out"),
        ({"unparseable": 3, "timed_out": 2}, "broken: too many rollouts unparseable"),
    ],
)
def test_more_than_half_broken_is_reviewed_with_the_reason_wherever_it_ranks(counts, reason):
    where = [1, 31, 59]
    plan = triage(scores(where, **counts), probes(), [], CFG)
    for i in where:
        assert (entry(plan, i)["route"], entry(plan, i)["reason"]) == ("review", reason)
        assert IDS[i] not in plan.to_buy()
    assert plan.counts()["review"] == 3


def test_half_is_not_more_than_half_and_the_limits_are_settings():
    table = scores([1], unparseable=4, truncated=4)
    assert triage(table, probes(), [], CFG).counts()["review"] == 0
    assert triage(table, probes(), [], replace(CFG, max_unanswered=0.4)).counts()["review"] == 1
    everything = scores([1], truncated=8)
    assert triage(everything, probes(), [], CFG).counts()["review"] == 1
    assert triage(everything, probes(), [], replace(CFG, max_truncated=1.0)).counts()["review"] == 0


def test_a_broken_probe_is_a_bought_label_but_does_not_bend_the_curve():
    good = probes()
    # It would say that the surest prompts fail.
    bad = [Outcome(IDS[i], 0.0, False) for i in (1, 3, 5)]
    table = scores([1, 3, 5], unparseable=8)
    owned = [o.pt_id for o in good + bad]
    plan = triage(table, good + bad, owned, CFG)
    without = triage(table, good, owned, CFG)
    assert plan.curve == without.curve
    assert plan.table == without.table
    assert plan.rows.equals(without.rows)
    assert plan.labels["bought"] == len(owned)
    assert plan.labels["probes_in_review"] == 3
    assert entry(plan, 1)["route"] == "review"


def test_labels_of_broken_prompts_count_against_the_budget():
    table = scores([1, 3], unparseable=8)
    plan = triage(table, probes(), ["001", "003"], replace(CFG, budget=5))
    assert plan.labels["to_buy"] == 3


def test_a_calibration_left_with_too_few_probes_says_why():
    table = scores(range(0, 50, 2), truncated=8)
    with pytest.raises(PivotTraceError, match=r"Only 5 probes .* beside 25 whose rollouts are bro"):
        triage(table, probes(), [], CFG)
