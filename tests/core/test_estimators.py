"""Estimators on groups whose score can be worked out by hand."""

import math

import pytest

from pivottrace_verl.answers import cluster
from pivottrace_verl.estimators import ESTIMATORS, GroupRecord, RolloutRecord


def make_rollout(n_tokens=10, pivots=1, entropy=0.5, answer="a"):
    return RolloutRecord(n_tokens, pivots, entropy, -0.5, answer, truncated=False)


def make_group(*rollouts, pt_id="p", seed=0):
    clusters = cluster([r.answer for r in rollouts], "exact")
    return GroupRecord(list(rollouts), clusters, pt_id, seed)


GROUP = make_group(
    make_rollout(n_tokens=10, pivots=1, entropy=0.2, answer="a"),
    make_rollout(n_tokens=20, pivots=6, entropy=0.4, answer="a"),
    make_rollout(n_tokens=30, pivots=None, entropy=None, answer=None),
    make_rollout(n_tokens=40, pivots=8, entropy=0.6, answer="b"),
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pivot_density", (0.1 + 0.3 + 0.2) / 3),
        ("pivot_count", 5.0),
        ("entropy", 0.4),
        ("consistency", 0.5),
        ("length", 25.0),
    ],
)
def test_scores_are_means_over_the_rollouts_that_were_captured(name, expected):
    assert ESTIMATORS[name](GROUP) == pytest.approx(expected)


def test_a_group_that_was_never_traced_is_unknown_not_certain():
    group = make_group(make_rollout(pivots=None, entropy=None))
    assert all(
        math.isnan(ESTIMATORS[n](group)) for n in ("pivot_density", "pivot_count", "entropy")
    )
    assert ESTIMATORS["consistency"](group) == 0.0


def test_a_rollout_without_a_pivot_counts_as_zero_not_as_missing():
    group = make_group(make_rollout(pivots=0, entropy=0.0), make_rollout(pivots=4, entropy=1.0))
    assert ESTIMATORS["pivot_count"](group) == 2.0
    assert ESTIMATORS["entropy"](group) == 0.5


def test_random_depends_on_seed_and_prompt_only():
    score = ESTIMATORS["random"]
    assert score(make_group(make_rollout())) == score(make_group(make_rollout(pivots=9)))
    assert score(make_group(make_rollout())) != score(make_group(make_rollout(), seed=1))
    assert score(make_group(make_rollout())) != score(make_group(make_rollout(), pt_id="q"))
    draws = [score(make_group(make_rollout(), pt_id=str(i))) for i in range(500)]
    assert 0.45 < sum(draws) / 500 < 0.55
    assert all(0 <= d < 1 for d in draws)
