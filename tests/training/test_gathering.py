"""Sessions of one prompt wait for each other and are judged once."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pivottrace_verl.answers import TIMED_OUT, get_answers
from pivottrace_verl.pivots import DetectorConfig
from pivottrace_verl.training.gathering import Group, Scored
from pivottrace_verl.training.groups import VotePolicy

EXACT = get_answers("exact")
DETECTOR = DetectorConfig(tau=0.5)


def said(answer: str | None, score: float = 0.0, **trace: Any) -> Any:
    """What the reward worker says of a rollout."""
    return Scored.of(score, {"score": score}, answer, **trace)


async def session(group: Any, number: int, rollout: Any, delay: float, labeled: bool) -> float:
    await asyncio.sleep(delay)
    group.arrive(number, rollout)
    place, verdict = await group.verdict(
        number, labeled=labeled, kind=EXACT, policy=VotePolicy(), detector=DETECTOR
    )
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


def voted(weight: str, *rollouts: Any) -> tuple[list[float], list[int | None]]:
    """Rewards of a group of weighted votes, and the pivots of its rollouts."""

    async def run() -> tuple[list[float], list[int | None]]:
        group = Group(len(rollouts))
        for number, rollout in enumerate(rollouts):
            group.arrive(number, rollout)
        policy = VotePolicy(kind="weighted", weight=weight, quorum=1)
        _, verdict = await group.verdict(
            0, labeled=False, kind=EXACT, policy=policy, detector=DETECTOR
        )
        return verdict.rewards, group.pivots

    return asyncio.run(run())


def test_a_vote_weighs_what_its_own_rollouts_probability_says() -> None:
    sure, unsure = said("9", logprob=-0.1), said("7", logprob=-3.0)
    assert voted("certainty", sure, unsure, unsure) == ([1.0, 0.0, 0.0], [None] * 3)


def test_a_vote_weighs_what_its_own_rollouts_pivots_say() -> None:
    def steps(*tokens: int) -> Any:
        row = np.zeros(40)
        for token in tokens:
            row[token:] += 1.0
        return row

    calm = said("9", signals=[steps()])
    wild = said("7", signals=[steps(5, 15, 25), steps(39)])
    # Weights 1, 1/5 and 1/5; the pivots of both turns count.
    assert voted("pivots", wild, calm, wild) == ([0.0, 1.0, 0.0], [4, 0, 4])
    # A rollout without a trace weighs as the others do in the mean: 1, 1/5 and 3/5.
    lost = said("7")
    assert voted("pivots", lost, wild, calm) == ([0.0, 0.0, 1.0], [None, 4, 0])


@pytest.mark.parametrize("slow", ["canonical_many", "equal_many"])
def test_sessions_of_other_prompts_go_on_while_a_kind_waits_for_its_workers(slow: str) -> None:
    class Slow:
        """Waits for ever, if the event loop stands still."""

        symmetric = True

        def _wait(self, what: str) -> None:
            if what == slow:
                assert others.wait(timeout=5), "nothing else went on"

        def canonical_many(self, labels: Sequence[str]) -> list[Any]:
            self._wait("canonical_many")
            return list(labels)

        def equal_many(self, pairs: Sequence[tuple[str, str]]) -> list[Any]:
            self._wait("equal_many")
            return [False for _ in pairs]

    others = threading.Event()

    async def run() -> list[float]:
        group: Any = Group(2)
        group.arrive(0, said("7"))
        group.arrive(1, said("9"))
        deciding = asyncio.ensure_future(
            group.verdict(0, labeled=True, kind=Slow(), policy=VotePolicy(), detector=DETECTOR)
        )
        await asyncio.sleep(0.01)
        others.set()
        return list((await deciding)[1].rewards)

    assert asyncio.run(asyncio.wait_for(run(), timeout=10)) == [0.0, 0.0]


def test_a_verdict_that_fails_fails_for_every_session() -> None:
    class Broken:
        def canonical(self, label: str) -> str:
            raise ZeroDivisionError(label)

    async def run() -> list[Any]:
        group: Any = Group(3)
        for number in range(3):
            group.arrive(number, said("7"))
        asked = [
            group.verdict(i, labeled=False, kind=Broken(), policy=VotePolicy(), detector=DETECTOR)
            for i in range(3)
        ]
        return await asyncio.gather(*asked, return_exceptions=True)

    found = asyncio.run(asyncio.wait_for(run(), timeout=10))
    assert [type(error) for error in found] == [ZeroDivisionError] * 3


def test_a_group_knows_how_many_sessions_failed() -> None:
    group = Group(4)
    for number in range(3):
        group.arrive(number, said("7"))
    group.leave(3)
    assert group.failed == 1 and group._complete.is_set()


def test_what_a_reward_worker_says_is_read_whatever_the_function_returned() -> None:
    # A bare score; a dict; graded by more than the answer; the agent loop's own reward.
    bare = Scored.of(0.5, {"acc": 1.0}, "7")
    assert (bare.score, bare.managed, bare.right) == (1.0, 0.5, True)
    both = Scored.of(-1.0, {"score": -1.0, "acc": False}, "7")
    assert (both.score, both.right) == (-1.0, False)
    graded = Scored.of(0.4, {"score": 0.4, "acc": True, "timed_out": 0.0}, "7", -0.25)
    assert (graded.score, graded.right, graded.answer, graded.logprob) == (0.4, True, "7", -0.25)
    own = Scored.of(0.75, {}, None)
    assert (own.score, own.managed, own.right) == (0.75, 0.75, True)
    assert Scored.of(0.0, {"score": 0.0, "timed_out": 1.0}, "7").answer is TIMED_OUT
