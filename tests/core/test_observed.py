"""Groups as numbers."""

import pytest

from pivottrace_verl.observed import MEASURED, observed
from tests.step_records import record


def test_a_group_is_the_means_of_its_rollouts_and_its_estimators():
    rows = [
        ("u", record("a", reward=1.0)),
        ("u", record("a", reward=0.0, n_tokens=30, pivots=4, logprob=-1.5)),
    ]
    (group,) = observed(rows)
    assert (group.pass_rate, group.n_tokens, group.majority_right) == (0.5, 20, True)
    assert set(group.values) == set(MEASURED)
    assert group.values["pivot_count"] == 3
    assert group.values["nll"] == pytest.approx(1.0)
    assert group.values["consistency"] == 0.25


def test_nothing_that_depends_on_a_label_is_kept_without_one():
    rows = [("u", record("a", reward=1.0, labeled=False, majority_right=True))]
    (group,) = observed(rows)
    assert (group.pass_rate, group.majority_right) == (None, None)


def test_the_pass_rate_is_of_right_rollouts_whatever_their_reward_and_leaves_out_what_timed_out():
    rows = [("u", record("a", reward=r, right=float(r > 0))) for r in (-1.0, -1.5, 0.5, -1.0)]
    rows.append(("u", record("a", reward=-0.75, timed_out=True)))
    (group,) = observed(rows)
    assert (group.pass_rate, group.labeled) == (0.25, True)
    assert group.reward == pytest.approx(-0.75)


def test_a_group_of_which_all_timed_out_is_as_one_without_a_label():
    (group,) = observed([("u", record("a", reward=0.0, timed_out=True))] * 2)
    assert (group.labeled, group.pass_rate, group.majority_right) == (False, None, None)


def test_what_was_not_traced_or_not_asked_for_has_no_value():
    lost = {"traced": False, "logprob": None}
    one = record("a", reward=1.0)
    two = {
        k: v for k, v in record("a", reward=0.0, **lost).items() if k not in ("pivots", "entropy")
    }
    (group,) = observed([("u", one), ("u", two)])
    assert group.values["pivot_count"] == 2
    (group,) = observed([("u", two)])
    assert set(group.values) == {"consistency", "length"}


def test_the_same_prompt_twice_in_a_batch_is_two_groups():
    assert len(observed([("u", record("a", reward=1.0)), ("v", record("a", reward=0.0))])) == 2
