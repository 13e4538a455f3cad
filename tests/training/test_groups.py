"""The reward of one group."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from pivottrace_verl.answers import TIMED_OUT, Answer, get_answers
from pivottrace_verl.training.groups import NO_VOTE, VERIFIED, VOTED, Verdict, VotePolicy, judge

EXACT = get_answers("exact")


def verdict(
    answers: Sequence[Answer],
    verified: list[float] | None = None,
    labeled: bool = False,
    **policy: float,
) -> Verdict:
    scores = verified if verified is not None else [0.0] * len(answers)
    policy_ = VotePolicy(**policy)  # type: ignore[arg-type]
    return judge(answers, scores, labeled=labeled, kind=EXACT, policy=policy_)


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


def test_a_rollout_that_timed_out_has_no_vote_and_no_reward_and_is_marked() -> None:
    result = verdict(["7", "7", TIMED_OUT, TIMED_OUT, TIMED_OUT, None])
    assert result.rewards == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert (result.target, result.agreement) == ("7", 2 / 6)
    assert result.timed_out == [False, False, True, True, True, False]
    assert verdict([TIMED_OUT] * 3).outcome == NO_VOTE


def test_a_labeled_group_marks_what_could_not_be_compared_with_the_label() -> None:
    result = verdict(["7", TIMED_OUT], verified=[1.0, 0.0], labeled=True)
    assert (result.rewards, result.timed_out) == ([1.0, 0.0], [False, True])


def test_answers_that_time_out_against_each_other_are_marked_in_the_vote_only() -> None:
    math = get_answers("math")
    answers = ["3", "3", "9^{9^{9^{9}}}"]
    voted = judge(answers, [0.0] * 3, labeled=False, kind=math, policy=VotePolicy())
    assert (voted.rewards, voted.timed_out) == ([1.0, 1.0, 0.0], [False, False, True])
    known = judge(answers, [0.0, 0.0, 1.0], labeled=True, kind=math, policy=VotePolicy())
    assert (known.rewards, known.timed_out) == ([0.0, 0.0, 1.0], [False, False, False])


@given(st.lists(st.sampled_from(["1", "2", "3", None]), min_size=1, max_size=9), st.randoms())
def test_rewards_do_not_depend_on_the_order_of_the_rollouts(
    answers: list[str | None], random: object
) -> None:
    order = list(range(len(answers)))
    random.shuffle(order)  # type: ignore[attr-defined]
    straight = verdict(answers)
    shuffled = verdict([answers[i] for i in order])
    assert shuffled.rewards == [straight.rewards[i] for i in order]
    assert shuffled.target == straight.target
