"""The reward of one group."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pivottrace_verl.answers import TIMED_OUT, Answer, AnswerKind, get_answers
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.training.groups import (
    DROPPED,
    NO_VOTE,
    SOFT,
    VERIFIED,
    VOTED,
    Verdict,
    VotePolicy,
    judge,
)

EXACT, MATH = get_answers("exact"), get_answers("math")


def verdict(
    answers: Sequence[Answer],
    verified: list[float] | None = None,
    labeled: bool = False,
    weights: Sequence[float | None] | None = None,
    answers_kind: AnswerKind = EXACT,
    **policy: Any,
) -> Verdict:
    scores = verified if verified is not None else [0.0] * len(answers)
    return judge(
        answers,
        scores,
        labeled=labeled,
        kind=answers_kind,
        policy=VotePolicy(**policy),
        weights=weights,
    )


def test_unlabeled_group_is_rewarded_for_agreeing_with_its_majority() -> None:
    result = verdict(["7", "7", "9", None])
    assert result.rewards == [1.0, 1.0, 0.0, 0.0]
    assert (result.outcome, result.target, result.agreement) == (VOTED, "7", 0.5)
    assert result.majority_right is None


def test_labeled_group_keeps_the_verifiers_rewards_even_against_the_majority() -> None:
    result = verdict(["7", "7", "9"], verified=[0.0, 0.0, 1.0], labeled=True)
    assert result.rewards == [0.0, 0.0, 1.0]
    assert (result.outcome, result.majority_right) == (VERIFIED, False)


def test_labeled_group_says_when_the_vote_would_have_been_right() -> None:
    assert verdict(["7", "7", "9"], verified=[1.0, 1.0, 0.0], labeled=True).majority_right is True


def test_scores_of_an_unlabeled_group_are_never_read() -> None:
    assert verdict(["7", "7", "9"], verified=[0.0, 0.0, 99.0]) == verdict(["7", "7", "9"])


def test_a_tie_rewards_nobody() -> None:
    result = verdict(["7", "7", "9", "9"])
    assert (result.rewards, result.outcome, result.target) == ([0.0] * 4, NO_VOTE, None)


def test_an_unparseable_group_rewards_nobody() -> None:
    assert verdict([None, None, None]).rewards == [0.0, 0.0, 0.0]


def test_too_little_agreement_rewards_nobody() -> None:
    answers: list[str | None] = ["7", "7", "8", "9", None, None]
    assert verdict(answers, min_agreement=0.3).outcome == VOTED
    assert verdict(answers, min_agreement=0.5).outcome == NO_VOTE


def test_a_single_vote_is_below_the_quorum() -> None:
    assert verdict(["7", None, None]).outcome == NO_VOTE


def test_a_rollout_that_timed_out_has_no_vote_and_teaches_nothing_and_is_marked() -> None:
    result = verdict(["7", "7", TIMED_OUT, TIMED_OUT, TIMED_OUT, None])
    assert result.rewards == result.scores == [1.0, 1.0, 2 / 3, 2 / 3, 2 / 3, 0.0]
    assert result.weights == [1.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    assert result.right == [1.0, 1.0, None, None, None, 0.0]
    assert (result.target, result.agreement) == ("7", 2 / 6)
    assert result.timed_out == [False, False, True, True, True, False]
    assert verdict([TIMED_OUT] * 3).outcome == NO_VOTE


def test_a_labeled_group_marks_what_could_not_be_compared_with_the_label() -> None:
    answers = ["7", "7", TIMED_OUT, "7"]
    result = verdict(answers, verified=[1.0, 1.0, 0.0, 1.0], labeled=True)
    assert result.rewards == [1.0] * 4
    assert result.timed_out == [False, False, True, False]
    assert result.weights == [1.0, 1.0, 0.0, 1.0]
    assert result.right == [1.0, 1.0, None, 1.0]


def test_a_group_of_which_all_timed_out_teaches_nothing() -> None:
    for labeled in (True, False):
        result = verdict([TIMED_OUT] * 3, verified=[0.0] * 3, labeled=labeled)
        assert (result.rewards, result.weights) == ([0.0] * 3, [0.0] * 3)
        assert result.right == [None] * 3


@pytest.mark.parametrize("policy", [{}, {"otherwise": "drop"}, {"kind": "verified_only"}])
def test_a_group_without_a_reward_has_no_advantage_whatever_the_estimator(policy: Any) -> None:
    assert verdict(["7", "9"], **policy).weights == [0.0, 0.0]


@pytest.mark.parametrize("policy", [{}, {"otherwise": "soft"}])
def test_a_group_with_a_reward_has_its_advantages(policy: Any) -> None:
    assert verdict(["7", "7"], **policy).weights == [1.0, 1.0]
    assert verdict(["7", "9"], otherwise="soft").weights == [1.0, 1.0]
    assert verdict(["7", "9"], [0.0, 0.0], labeled=True).weights == [1.0, 1.0]


def test_what_the_reward_manager_adds_is_kept_where_there_is_a_reward() -> None:
    added = [0.0, -0.5, 0.0, -0.5]

    def judged(answers: list[Answer], scores: list[float], labeled: bool, **policy: Any) -> Verdict:
        managed = [score + more for score, more in zip(scores, added, strict=True)]
        return judge(answers, scores, managed=managed, labeled=labeled, kind=EXACT,
                     policy=VotePolicy(**policy))  # fmt: skip

    known = judged(["7", "7", "9", "9"], [1.0, 1.0, -1.0, -1.0], True)
    assert known.rewards == [1.0, 0.5, -1.0, -1.5]
    assert (known.scores, known.right) == ([1.0, 1.0, -1.0, -1.0], [1.0, 1.0, 0.0, 0.0])
    voted = judged(["7", "7", "9", "7"], [0.0] * 4, False)
    assert (voted.rewards, voted.scores) == ([1.0, 0.5, 0.0, 0.5], [1.0, 1.0, 0.0, 1.0])
    soft = judged(["7", "7", "9", "9"], [0.0] * 4, False, otherwise="soft")
    assert soft.rewards == [0.5, 0.0, 0.5, 0.0]
    # Nothing to teach: nothing that verl's filter could take for it.
    assert judged(["7", "7", "9", "9"], [0.0] * 4, False).rewards == [0.0] * 4
    late = judged(["7", "7", TIMED_OUT, "9"], [1.0, 1.0, 0.0, 0.0], True)
    assert late.rewards == pytest.approx([1.0, 0.5, 1 / 3, -0.5])


def test_whether_an_answer_is_right_is_the_verifiers_word_where_it_has_one() -> None:
    result = judge(["7", "9"], [0.4, 0.3], right=[True, False], labeled=True, kind=EXACT,
                   policy=VotePolicy())  # fmt: skip
    assert (result.rewards, result.right) == ([0.4, 0.3], [1.0, 0.0])


def test_answers_that_time_out_against_each_other_are_marked_in_the_vote_only() -> None:
    math = get_answers("math")
    answers = ["3", "3", "9^{9^{9^{9}}}"]
    voted = judge(answers, [0.0] * 3, labeled=False, kind=math, policy=VotePolicy())
    assert (voted.weights, voted.timed_out) == ([1.0, 1.0, 0.0], [False, False, True])
    known = judge(answers, [0.0, 0.0, 1.0], labeled=True, kind=math, policy=VotePolicy())
    assert (known.rewards, known.timed_out) == ([0.0, 0.0, 1.0], [False, False, False])


def test_a_weak_vote_gives_the_shares_where_the_policy_is_soft() -> None:
    result = verdict(["7", "7", "9", None], quorum=3, otherwise="soft")
    assert (result.rewards, result.outcome, result.target) == ([0.5, 0.5, 0.25, 0.0], SOFT, None)
    assert verdict(["7", "7", "9", "9"], otherwise="soft").rewards == [0.5] * 4
    assert verdict(["7", "7", "9"], otherwise="soft").outcome == VOTED


def test_a_weak_vote_drops_the_group_where_the_policy_says_so() -> None:
    result = verdict(["7", "9"], otherwise="drop")
    assert (result.rewards, result.outcome) == ([0.0, 0.0], DROPPED)
    assert verdict(["7", "7"], otherwise="drop").outcome == VOTED


def test_verified_only_gives_unlabeled_groups_nothing_and_labeled_ones_their_scores() -> None:
    result = verdict(["7", "7", "7"], kind="verified_only", otherwise="soft")
    assert (result.rewards, result.outcome) == ([0.0] * 3, DROPPED)
    known = verdict(["7", "9"], [1.0, 0.0], labeled=True, kind="verified_only")
    assert (known.rewards, known.outcome) == ([1.0, 0.0], VERIFIED)


def test_a_weighted_vote_follows_the_weights() -> None:
    answers = ["7", "7", "9", "9", "9"]
    weights = [0.9, 0.8, 0.1, 0.2, 0.3]
    result = verdict(answers, weights=weights, kind="weighted")
    assert (result.target, result.rewards) == ("7", [1.0, 1.0, 0.0, 0.0, 0.0])
    # The agreement that is reported counts rollouts, whatever their weights.
    assert result.agreement == 3 / 5
    assert verdict(answers, weights=weights).target == "9"


def test_a_weighted_vote_is_weak_by_its_share_of_the_weights() -> None:
    weights = [0.5, 0.5, 0.5, 0.5]
    answers = ["7", "7", "8", None]
    assert verdict(answers, weights=weights, kind="weighted", min_agreement=0.5).outcome == VOTED
    assert verdict(answers, weights=weights, kind="weighted", min_agreement=0.51).outcome == NO_VOTE
    # One rollout is no vote, however much it weighs.
    assert verdict(["7", "8", "8"], weights=[9, 1, 1], kind="weighted").outcome == NO_VOTE


def test_an_unknown_weight_counts_as_the_mean_of_the_others() -> None:
    some = verdict(["7", "7", "9"], weights=[0.2, 0.4, None], kind="weighted")
    assert some == verdict(["7", "7", "9"], weights=[0.2, 0.4, 0.3], kind="weighted")
    none = verdict(["7", "7", "9"], weights=[None] * 3, kind="weighted")
    assert none == verdict(["7", "7", "9"])


def test_weights_that_are_all_zero_give_no_vote() -> None:
    assert verdict(["7", "7", "9"], weights=[0.0] * 3, kind="weighted").outcome == NO_VOTE


def test_the_gauge_asks_whether_the_weighted_vote_would_have_been_right() -> None:
    answers, scores, weights = ["7", "7", "9"], [0.0, 0.0, 1.0], [0.1, 0.1, 0.9]
    policy = {"labeled": True, "weights": weights, "kind": "weighted"}
    result = verdict(answers, scores, **policy)
    assert (result.majority_right, result.votes) == (True, False)
    assert verdict(answers, scores, **policy, quorum=1).votes


def test_a_votes_weight_falls_with_doubt() -> None:
    certainty, pivots = VotePolicy(), VotePolicy(weight="pivots")
    assert certainty.weight_of(math.log(0.25), None) == pytest.approx(0.25)
    assert certainty.weight_of(None, 3) is None
    assert (pivots.weight_of(-1.0, 3), pivots.weight_of(-1.0, None)) == (0.25, None)


def test_the_entropy_of_the_answers_is_in_nats_and_leaves_out_what_has_no_answer() -> None:
    assert verdict(["7", "7", "9", "9", None]).answer_entropy == pytest.approx(math.log(2))
    assert verdict(["7", "7", None]).answer_entropy == 0.0
    assert verdict([None, None]).answer_entropy == 0.0


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ({"kind": "all"}, "kind is 'all'"),
        ({"weight": "length"}, "weight is 'length'"),
        ({"otherwise": "guess"}, "otherwise is 'guess'"),
        ({"quorum": 0}, "quorum is 0"),
        ({"min_agreement": 1.5}, "min_agreement 1.5"),
    ],
)
def test_a_policy_that_does_not_exist_is_refused_in_a_sentence(policy: Any, said: str) -> None:
    with pytest.raises(PivotTraceError, match=said):
        VotePolicy(**policy)


quick = settings(deadline=None)
votes = st.lists(
    st.tuples(st.sampled_from(["1", "2", "3", None, TIMED_OUT]), st.none() | st.floats(0, 1)),
    min_size=1,
    max_size=9,
)
policies = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["majority", "weighted", "verified_only"]),
        "otherwise": st.sampled_from(["none", "soft", "drop"]),
        "quorum": st.integers(1, 4),
        "min_agreement": st.sampled_from([0.0, 0.3, 0.5, 0.75]),
    }
)


def held(
    rollouts: Sequence[tuple[Any, Any]], policy: dict[str, Any], answers_kind: AnswerKind = EXACT
) -> Verdict:
    answers, weights = zip(*rollouts, strict=True)
    return verdict(answers, weights=weights, answers_kind=answers_kind, **policy)


@quick
@given(votes, policies, st.randoms())
def test_rewards_do_not_depend_on_the_order_of_the_rollouts(
    rollouts: list[tuple[Any, Any]], policy: dict[str, Any], random: Any
) -> None:
    order = list(range(len(rollouts)))
    random.shuffle(order)
    straight = held(rollouts, policy)
    shuffled = held([rollouts[i] for i in order], policy)
    assert shuffled.rewards == [straight.rewards[i] for i in order]
    assert shuffled.timed_out == [straight.timed_out[i] for i in order]
    for name in ("outcome", "target", "agreement", "answer_entropy", "votes"):
        assert getattr(shuffled, name) == getattr(straight, name)


@quick
@given(votes, policies, st.permutations(["1", "2", "3"]))
def test_rewards_do_not_depend_on_what_the_answers_are_called(
    rollouts: list[tuple[Any, Any]], policy: dict[str, Any], names: list[str]
) -> None:
    other = dict(zip(["1", "2", "3"], names, strict=True))
    renamed = held([(other.get(answer, answer), weight) for answer, weight in rollouts], policy)
    plain = held(rollouts, policy)
    assert (renamed.rewards, renamed.outcome) == (plain.rewards, plain.outcome)
    assert renamed.target == other.get(plain.target or "")


@quick
@given(votes, policies, st.data())
def test_rewards_do_not_depend_on_how_equal_answers_are_written(
    rollouts: list[tuple[Any, Any]], policy: dict[str, Any], data: st.DataObject
) -> None:
    spellings = {
        "1": ["1", "1.0", r"\frac{2}{2}"],
        "2": ["2", "02", "4/2"],
        "3": ["3", "3.00", "9/3"],
        None: [None],
        TIMED_OUT: [TIMED_OUT],
    }
    spelt = [(data.draw(st.sampled_from(spellings[a])), weight) for a, weight in rollouts]
    plain, written = held(rollouts, policy), held(spelt, policy, MATH)
    assert (written.rewards, written.outcome) == (plain.rewards, plain.outcome)
    assert (written.agreement, written.timed_out) == (plain.agreement, plain.timed_out)


@quick
@given(votes, policies)
def test_a_vote_rewards_those_who_gave_its_answer_and_nobody_without_one(
    rollouts: list[tuple[Any, Any]], policy: dict[str, Any]
) -> None:
    result = held(rollouts, policy)
    known = [answer is not TIMED_OUT for answer, _ in rollouts]
    if result.outcome == VOTED:
        right = [float(answer == result.target) for answer, _ in rollouts]
        assert result.right == [r if k else None for r, k in zip(right, known, strict=True)]
    for reward, weight, (answer, _) in zip(result.rewards, result.weights, rollouts, strict=True):
        assert 0.0 <= reward <= 1.0
        if answer is None:
            assert reward == 0.0
        if answer is TIMED_OUT or result.outcome in (NO_VOTE, DROPPED):
            assert weight == 0.0


@quick
@given(votes, policies, st.booleans())
def test_a_timed_out_rollout_does_not_move_what_the_others_are_compared_with(
    rollouts: list[tuple[Any, Any]], policy: dict[str, Any], labeled: bool
) -> None:
    answers = [answer for answer, _ in rollouts]
    result = verdict(answers, [float(a == "1") for a in answers], labeled, **policy)
    known = [r for r, late in zip(result.rewards, result.timed_out, strict=True) if not late]
    if known:
        mean = sum(known) / len(known)
        assert sum(result.rewards) / len(result.rewards) == pytest.approx(mean)


@quick
@given(votes, policies, st.integers(2, 3))
def test_every_rollout_twice_gives_each_the_same_reward(
    rollouts: list[tuple[Any, Any]], policy: dict[str, Any], times: int
) -> None:
    once = held(rollouts, {**policy, "quorum": 1})
    often = held(rollouts * times, {**policy, "quorum": times})
    assert often.rewards == pytest.approx(once.rewards * times)
    assert (often.outcome, often.target) == (once.outcome, once.target)


@quick
@given(st.integers(1, 4), st.integers(2, 3), policies)
def test_a_tie_for_the_top_never_gives_a_target(
    each: int, top: int, policy: dict[str, Any]
) -> None:
    answers = [(str(answer), 0.5) for answer in range(top) for _ in range(each)]
    assert held([*answers, (None, 0.5)], policy).target is None


@quick
@given(votes, policies)
def test_equal_weights_vote_as_none(
    rollouts: list[tuple[Any, Any]], policy: dict[str, Any]
) -> None:
    alike = [(answer, 0.7) for answer, _ in rollouts]
    weighted = held(alike, {**policy, "kind": "weighted"})
    plain = held(alike, {**policy, "kind": "majority"})
    assert weighted.rewards == pytest.approx(plain.rewards)
    assert (weighted.outcome, weighted.target) == (plain.outcome, plain.target)
