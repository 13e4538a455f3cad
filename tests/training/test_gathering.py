"""Sessions of one prompt wait for each other and are judged once."""

import asyncio
from typing import Any

from pivottrace_verl.answers import TIMED_OUT, get_answers
from pivottrace_verl.training.gathering import Group, Scored
from pivottrace_verl.training.groups import VotePolicy

EXACT = get_answers("exact")


def said(answer: str | None, score: float = 0.0, weight: float | None = None) -> Any:
    """What the reward worker says of a rollout."""
    return Scored.of(score, {"score": score}, answer, weight)


async def session(group: Any, number: int, rollout: Any, delay: float, labeled: bool) -> float:
    await asyncio.sleep(delay)
    group.arrive(number, rollout)
    place, verdict = await group.verdict(number, labeled=labeled, kind=EXACT, policy=VotePolicy())
    return float(verdict.rewards[place])


def rewards(answers: list[str | None], delays: list[float], labeled: bool = False,
            scores: list[float] | None = None) -> list[float]:  # fmt: skip
    async def run() -> list[float]:
        group = Group(len(answers))
        told = [said(a, s) for a, s in zip(answers, scores or [0.0] * len(answers), strict=True)]
        return await asyncio.gather(
            *(session(group, i, o, delays[i], labeled) for i, o in enumerate(told))
        )

    return asyncio.run(asyncio.wait_for(run(), timeout=10))


def test_each_session_gets_its_own_reward_whatever_the_order_of_arrival() -> None:
    answers: list[str | None] = ["7", "9", "7", None]
    for delays in ([0, 0, 0, 0], [0.03, 0.02, 0.01, 0], [0, 0.03, 0, 0.01]):
        assert rewards(answers, delays) == [1.0, 0.0, 1.0, 0.0]


def test_a_labeled_group_gets_the_verifiers_scores() -> None:
    assert rewards(["7", "7", "9"], [0, 0, 0], labeled=True, scores=[0.0, 0.0, 1.0]) == [0, 0, 1]


def test_a_session_that_fails_is_not_waited_for_and_does_not_vote() -> None:
    async def run() -> list[float]:
        group = Group(3)

        async def fails() -> float:
            await asyncio.sleep(0.02)
            group.leave(2)
            return -1.0

        return await asyncio.gather(
            session(group, 0, said("7"), 0.0, False),
            session(group, 1, said("7"), 0.0, False),
            fails(),
        )

    assert asyncio.run(asyncio.wait_for(run(), timeout=10)) == [1.0, 1.0, -1.0]


def test_leaving_after_arriving_is_not_counted_twice() -> None:
    async def run() -> bool:
        group = Group(2)
        group.arrive(0, said("7"))
        group.leave(0)
        return group._complete.is_set()

    assert asyncio.run(run()) is False


def test_the_weight_that_a_rollout_arrives_with_is_that_of_its_vote() -> None:
    async def run() -> list[float]:
        group = Group(3)
        for number, (answer, weight) in enumerate([("7", 0.1), ("9", 0.9), ("9", 0.8)][::-1]):
            group.arrive(number, said(answer, weight=weight))
        policy = VotePolicy(kind="weighted", quorum=1)
        _, verdict = await group.verdict(0, labeled=False, kind=EXACT, policy=policy)
        return list(verdict.rewards)

    assert asyncio.run(run()) == [1.0, 1.0, 0.0]


def test_a_group_knows_how_many_sessions_failed() -> None:
    group = Group(4)
    for number in range(3):
        group.arrive(number, said("7"))
    group.leave(3)
    assert group.failed == 1 and group._complete.is_set()


def test_what_a_reward_worker_says_is_read_whatever_the_function_returned() -> None:
    # A bare score; a dict; graded by more than the answer; the agent loop's own reward.
    bare = Scored.of(0.5, {"acc": 1.0}, "7", None)
    assert (bare.score, bare.managed, bare.right) == (1.0, 0.5, True)
    both = Scored.of(-1.0, {"score": -1.0, "acc": False}, "7", None)
    assert (both.score, both.right) == (-1.0, False)
    graded = Scored.of(0.4, {"score": 0.4, "acc": True, "timed_out": 0.0}, "7", 0.25)
    assert (graded.score, graded.right, graded.answer, graded.weight) == (0.4, True, "7", 0.25)
    own = Scored.of(0.75, {}, None, None)
    assert (own.score, own.managed, own.right) == (0.75, 0.75, True)
    assert Scored.of(0.0, {"score": 0.0, "timed_out": 1.0}, "7", None).answer is TIMED_OUT
