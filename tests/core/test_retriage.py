"""Routes that move while the policy learns."""

import copy

import numpy as np
import pyarrow as pa
import pytest

from pivottrace_verl.calibration import Outcome
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.observed import Observed
from pivottrace_verl.plan import TriageConfig
from pivottrace_verl.retriage import Retriage, RetriageConfig

P, N = 60, 20
"""Prompts of training, and probes beside them."""


def pool(values=None, cost=None):
    """Prompts p00.. of training and probes q00.., the later the more uncertain."""
    n = P + N
    u = np.concatenate([np.linspace(0, 1, P), np.linspace(0, 1, N)])
    zero = pa.array(np.zeros(n, dtype=np.int64))
    return pa.table(
        {
            "pt_id": [*(f"p{i:02d}" for i in range(P)), *(f"q{i:02d}" for i in range(N))],
            "n_rollouts": pa.array(np.full(n, 8)),
            "truncated": zero,
            "unparseable": zero,
            "timed_out": zero,
            "uncertainty/consistency": pa.array(u if values is None else values),
            "cost": pa.array(np.ones(n) if cost is None else cost),
            "data_source": ["a", "b"] * (n // 2),
        }
    )


def probes():
    """The policy is right on the easy half."""
    return [Outcome(f"q{i:02d}", 1.0 - i / N, i < N // 2) for i in range(N)]


PROBES = [f"q{i:02d}" for i in range(N)]


def make(budget=N + 5, triage=None, **config):
    settings = {
        "estimator": "consistency",
        "direction": "higher",
        "mastered": 0.8,
        **(triage or {}),
    }
    return Retriage(
        pool(),
        P,
        probes(),
        TriageConfig(**settings),
        RetriageConfig(**{"enable": True, "budget": budget, "every": 5, **config}),
    )


def group(pt_id, value, *, pass_rate=None, right=None, **more):
    return Observed(
        **{
            "pt_id": pt_id,
            "route": "self_train" if pass_rate is None else "annotate",
            "labeled": pass_rate is not None,
            "reward": 0.5,
            "pass_rate": pass_rate,
            "majority_right": right,
            "votes": True,
            "agreement": 1 - value,
            "answer_entropy": 0.1,
            "n_tokens": 9.0,
            "values": {"consistency": value},
            **more,
        }
    )


def value_of(retriage, pt_id):
    return retriage.state_dict()["values"][int(pt_id[1:])]


def test_without_news_the_most_uncertain_are_asked_for_as_far_as_the_budget_goes():
    moves = make().move(PROBES, spent=N)
    assert moves.asked == ["p59", "p58", "p57", "p56", "p55"]
    assert moves.resting[[59, 58, 57, 56, 55]].all() and moves.annotate[[59, 55]].all()
    # Mastered, or over the budget: out of training. Between, votes are trusted.
    assert moves.resting[0] and moves.resting[50]
    assert not moves.resting[25] and not moves.annotate[25]


def test_a_prompt_is_asked_for_once_and_counts_against_the_budget_from_then_on():
    retriage = make()
    assert len(retriage.move(PROBES, spent=N).asked) == 5
    assert retriage.move(PROBES, spent=N).asked == []
    # A label that came was promised before: it opens no new place.
    assert retriage.move([*PROBES, "p59"], spent=N + 1).asked == []
    assert retriage.metrics()["retriage/waiting"] == 4


def test_labels_of_prompts_outside_of_training_count_against_the_budget():
    assert len(make().move([*PROBES, "z1", "z2"], spent=N).asked) == 3


def test_a_budget_in_cost_counts_what_was_promised():
    retriage = make(budget=None, triage={"budget_cost": N + 2.0})
    assert len(retriage.move(PROBES, spent=float(N)).asked) == 2
    assert retriage.move(PROBES, spent=float(N)).asked == []


def test_a_labelled_prompt_is_trained_on_with_its_label():
    retriage = make()
    retriage.move(PROBES, spent=N)
    moves = retriage.move([*PROBES, "p59"], spent=N + 1)
    assert moves.annotate[59] and not moves.resting[59]


def test_a_prompt_the_policy_has_grown_unsure_of_is_newly_asked_for():
    retriage = make(budget=N + 1)
    retriage.observe(1, [group("p20", 3.0)])
    assert retriage.move(PROBES, spent=N).asked == ["p20"]


def test_new_values_are_smoothed_and_old_ones_age():
    retriage = make(smoothing=0.5, half_life=10)
    old = value_of(retriage, "p30")
    retriage.observe(0, [group("p30", 1.0)])
    assert value_of(retriage, "p30") == pytest.approx(0.5 * old + 0.5)
    held = value_of(retriage, "p30")
    retriage.observe(10, [group("p30", 0.0)])
    assert value_of(retriage, "p30") == pytest.approx(0.25 * held)


def test_a_value_that_was_unknown_is_the_new_one_and_an_unknown_new_one_changes_nothing():
    values = np.concatenate([np.linspace(0, 1, P), np.linspace(0, 1, N)])
    values[3] = np.nan
    settings = TriageConfig(estimator="consistency", direction="higher")
    retriage = Retriage(pool(values), P, probes(), settings, RetriageConfig(enable=True, budget=50))
    retriage.observe(1, [group("p03", 0.4), group("p04", 0.4, values={}), group("stranger", 0.4)])
    assert value_of(retriage, "p03") == 0.4
    assert value_of(retriage, "p04") == values[4]


def test_the_probes_in_training_move_the_thresholds():
    retriage = make(smoothing=0.0)
    before = retriage.move(PROBES, spent=N)
    learned = [group(f"q{i:02d}", i / N, pass_rate=1.0 - i / 100, right=True) for i in range(N)]
    retriage.observe(1, learned)
    after = retriage.move(PROBES, spent=N)
    assert after.asked == [] and after.counts()["resting"] > before.counts()["resting"]


def test_a_ranking_the_probes_do_not_confirm_any_more_moves_nothing_and_says_so():
    retriage = make(smoothing=0.0)
    retriage.observe(
        1, [group(f"q{i:02d}", i / N, pass_rate=i / N, right=i > N // 2) for i in range(N)]
    )
    moves = retriage.move(PROBES, spent=N)
    assert moves.refused is not None and "'consistency'" in moves.refused
    assert (moves.asked, retriage.metrics()) == ([], {"retriage/refused": 1.0})


def test_what_an_unbought_label_would_say_changes_nothing():
    """Groups without a label carry nonsense where the truth would stand."""
    plain, poisoned = make(), make()
    for step in range(1, 6):
        for i in range(P):
            one = group(f"p{i:02d}", (i * step % 7) / 7)
            plain.observe(step, [one])
            lie = Observed(**{**vars(one), "reward": 666.0, "majority_right": True})
            poisoned.observe(step, [lie])
    a, b = plain.move(PROBES, spent=N), poisoned.move(PROBES, spent=N)
    assert a.asked == b.asked
    for name in ("annotate", "resting", "uncertainty"):
        assert (getattr(a, name) == getattr(b, name)).all()


@pytest.mark.parametrize("killed", [1, 4, 7])
def test_a_resumed_retriage_decides_the_same(killed):
    def step(retriage, k):
        retriage.observe(k, [group(f"p{(k * j) % P:02d}", (k * j % 5) / 5) for j in range(10)])
        retriage.observe(k, [group(f"q{k % N:02d}", 0.5, pass_rate=0.5, right=True)])
        return retriage.move(PROBES, spent=N) if retriage.due(k) else None

    whole, first, second = make(every=3), make(every=3), make(every=3)
    expected = [step(whole, k) for k in range(1, 10)]
    found = [step(first, k) for k in range(1, killed)]
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    found += [step(second, k) for k in range(killed, 10)]
    for a, b in zip(expected, found, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.asked == b.asked and (a.uncertainty == b.uncertainty).all()


def test_labels_that_are_used_from_the_next_step_on_count_and_are_not_asked_for():
    moves = make().move(PROBES, spent=N + 2, unused=["p59", "p20"])
    assert moves.asked == ["p58", "p57", "p56"]
    assert moves.annotate[59] and moves.resting[59]
    priced = make(budget=None, triage={"budget_cost": N + 5.0})
    assert priced.move(PROBES, spent=N + 2, unused=["p59", "p20"]).asked == moves.asked


def test_what_a_killed_run_asked_for_takes_its_share_of_the_budget():
    retriage = make()
    retriage.asked_for(["p30", "stranger"])
    moves = retriage.move(PROBES, spent=N, reserved=["p10", "p30", "stranger"])
    # p30 was asked for by now and waits, p10 will be; three are left of five.
    assert moves.asked == ["p59", "p58", "p57"]
    assert moves.resting[30] and moves.annotate[30]
    assert moves.annotate[10] == make().move(PROBES, spent=N).annotate[10]


def test_a_run_that_repeats_a_retriage_decides_the_same_though_its_requests_are_known():
    def told(retriage):
        moves = retriage.move(PROBES, spent=N)
        return moves.annotate.tolist(), moves.resting.tolist(), moves.uncertainty.tolist()

    first, again = make(), make()
    expected = told(first)
    again.asked_for(first.state_dict()["asked"])
    assert told(again) == expected
    assert again.metrics() == first.metrics()
    assert again.state_dict()["asked"] == first.state_dict()["asked"]


def test_a_quota_of_a_source_that_is_not_in_training_is_no_obstacle():
    moves = make(triage={"quotas": {"gone": 3, "a": N // 2 + 1}}).move(PROBES, spent=N)
    assert moves.refused is None and len(moves.asked) == 5
    assert sum(int(pt_id[1:]) % 2 == 0 for pt_id in moves.asked) == 1


def test_too_few_probes_are_told_at_the_start():
    settings = TriageConfig(estimator="consistency", direction="higher", budget=9)
    with pytest.raises(PivotTraceError, match="Only 7 probes"):
        Retriage(pool(), P, probes()[:7], settings, RetriageConfig(enable=True))


def test_off_is_never_due():
    assert not any(make(enable=False).due(step) for step in range(1, 50))
    assert [step for step in range(1, 12) if make().due(step)] == [5, 10]


@pytest.mark.parametrize(
    ("triage", "config", "said"),
    [
        ({"estimator": "coe"}, {}, "training measures.*'coe'"),
        ({}, {"budget": None}, "how many there may be"),
        ({}, {"every": 0}, "every 0 steps"),
        ({}, {"smoothing": 1.0}, "smoothing 1.0"),
        ({}, {"budget": -1}, "-1"),
    ],
)
def test_a_retriage_that_cannot_work_is_refused_in_a_sentence(triage, config, said):
    with pytest.raises(PivotTraceError, match=said):
        make(**{"triage": triage, **config})


def test_a_state_of_another_pool_is_refused():
    state = make().state_dict()
    with pytest.raises(PivotTraceError, match="5 prompts, but this run has 80"):
        make().load_state_dict({**state, "values": np.zeros(5)})
