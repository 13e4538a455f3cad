"""The group hook: sessions of one prompt wait for each other and are judged once."""

import asyncio
from typing import Any

import pytest

from pivottrace_verl.answers import get_answers
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.pivots import DetectorConfig
from pivottrace_verl.training.groups import VotePolicy

agent_loop = pytest.importorskip(
    "pivottrace_verl.training.agent_loop", reason="verl is not installed"
)

EXACT = get_answers("exact")


class Output:
    """What the hook reads of verl's AgentLoopOutput."""

    def __init__(self, answer: str | None, score: float = 0.0) -> None:
        info = {"pred": answer or "", "score": score, "timed_out": 0.0}
        self.extra_fields = {"reward_extra_info": info}
        self.response_logprobs: list[float] | None = None
        self.response_mask: list[int] = []


async def session(group: Any, number: int, output: Output, delay: float, labeled: bool) -> float:
    await asyncio.sleep(delay)
    group.arrive(number, output)
    reward, *_ = await group.reward(number, labeled=labeled, kind=EXACT, policy=VotePolicy())
    return float(reward)


def rewards(answers: list[str | None], delays: list[float], labeled: bool = False,
            scores: list[float] | None = None) -> list[float]:  # fmt: skip
    async def run() -> list[float]:
        group = agent_loop.Group(len(answers))
        outputs = [
            Output(a, s) for a, s in zip(answers, scores or [0.0] * len(answers), strict=True)
        ]
        return await asyncio.gather(
            *(session(group, i, o, delays[i], labeled) for i, o in enumerate(outputs))
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
        group = agent_loop.Group(3)

        async def fails() -> float:
            await asyncio.sleep(0.02)
            group.leave(2)
            return -1.0

        return await asyncio.gather(
            session(group, 0, Output("7"), 0.0, False),
            session(group, 1, Output("7"), 0.0, False),
            fails(),
        )

    assert asyncio.run(asyncio.wait_for(run(), timeout=10)) == [1.0, 1.0, -1.0]


def test_leaving_after_arriving_is_not_counted_twice() -> None:
    async def run() -> bool:
        group = agent_loop.Group(2)
        group.arrive(0, Output("7"))
        group.leave(0)
        return group._complete.is_set()

    assert asyncio.run(run()) is False


def test_the_weight_that_a_rollout_arrives_with_is_that_of_its_vote() -> None:
    async def run() -> list[float]:
        group = agent_loop.Group(3)
        for number, (answer, weight) in enumerate([("7", 0.1), ("9", 0.9), ("9", 0.8)][::-1]):
            group.arrive(number, Output(answer), weight)
        policy = VotePolicy(kind="weighted", quorum=1)
        return [
            (await group.reward(i, labeled=False, kind=EXACT, policy=policy))[0] for i in range(3)
        ]

    assert asyncio.run(run()) == [1.0, 1.0, 0.0]


def rollout(mask: list[int], logprobs: list[float] | None = None) -> Any:
    """A real output of verl's; token i is i, after the prompt 100, 101."""
    return agent_loop.AgentLoopOutput(
        prompt_ids=[100, 101],
        response_ids=list(range(len(mask))),
        response_mask=mask,
        response_logprobs=logprobs,
        metrics={},
        extra_fields={"from": "the engine"},
    )


def test_length_and_mean_log_probability_are_of_what_the_policy_generated() -> None:
    turns = rollout([1, 0, 0, 1], [-1.0, 0.0, 0.0, -3.0])
    assert agent_loop.generated([turns]) == (2, -2.0)
    assert agent_loop.generated([turns, rollout([1], [-8.0])]) == (3, -4.0)
    assert agent_loop.generated([rollout([1, 1])]) == (2, None)
    assert agent_loop.generated([rollout([0], [0.0])]) == (0, None)


@pytest.mark.parametrize(
    ("mask", "left"),
    [
        ([1, 1, 1], [0, 1, 2]),
        ([1, 1, 0, 0, 1, 1], [4, 5]),
        ([1, 0, 1, 0, 1], [4]),
        # What the chat's template adds after the last turn is not a turn of its own.
        ([1, 0, 1, 1, 0], [2, 3]),
        ([0, 1], [1]),
    ],
)
def test_the_answer_is_read_from_the_last_turn_only(mask: list[int], left: list[int]) -> None:
    output = rollout(mask)
    last = agent_loop.last_turn(output)
    assert last.response_ids == left and last.response_mask == [1] * len(left)
    assert last.prompt_ids == [100, 101, *range(left[0])]
    # The scorer's words end up where verl looks for them, and the rollout itself is as it was.
    last.extra_fields["reward_extra_info"] = {"pred": "7"}
    assert output.extra_fields["reward_extra_info"] == {"pred": "7"}
    assert output.response_mask == mask and output.response_ids == list(range(len(mask)))


def test_a_group_knows_how_many_sessions_failed() -> None:
    group = agent_loop.Group(4)
    for number in range(3):
        group.arrive(number, Output("7"))
    group.leave(3)
    assert group.failed == 1 and group._complete.is_set()


class Worker(agent_loop.PivotAgentLoopWorker):
    """The hook alone: verl's own start, and its reward workers, left out. The scorer reads the
    first token of what it is given as the answer."""

    def __init__(self, size: int, said: tuple[str, ...] = ("pred", "score")) -> None:
        self._kind, self._policy, self._said = EXACT, VotePolicy(), said
        self._waiting, self._logprobs, self._detector = self._policy, True, DetectorConfig(tau=0.1)
        self._groups = {"u": agent_loop.Group(size)}
        self._rollouts = {("u", i): agent_loop.Rollout(f"{i}", capture=True) for i in range(size)}

    async def _compute_score(self, outputs: list[Any], kwargs: dict[str, Any]) -> None:
        info = {"pred": str(outputs[-1].response_ids[0]), "score": 0.0}
        outputs[-1].extra_fields["reward_extra_info"] = {name: info[name] for name in self._said}

    async def session(self, number: int, *outputs: Any) -> float | None:
        """The reward of a session; None where it failed."""
        info = {"pt_id": "p", "route": "self_train", "labeled": False}
        kwargs = {"uid": "u", "session_id": number, "extra_info": info}
        try:
            await self._judge(list(outputs), kwargs)
        except (RuntimeError, PivotTraceError):
            self._groups["u"].leave(number)
            return None
        return float(outputs[-1].reward_score)


def answers(first: int, mask: list[int] | None = None) -> Any:
    output = rollout(mask or [1, 1])
    output.response_ids[0] = first
    return output


def together(worker: Worker, *outputs: Any) -> list[float | None]:
    async def run() -> list[float | None]:
        return await asyncio.gather(
            *(worker.session(i, *(o if isinstance(o, tuple) else (o,)))
              for i, o in enumerate(outputs))
        )  # fmt: skip

    return asyncio.run(asyncio.wait_for(run(), timeout=10))


def test_a_rollout_that_was_aborted_or_is_empty_has_no_vote_and_no_reward() -> None:
    worker = Worker(5)
    worker._rollouts["u", 0].turn(2).aborted = True
    outputs = [answers(9), rollout([]), answers(9), answers(7), answers(7)]
    # With the aborted one 9 and 7 would tie.
    assert together(worker, *outputs) == [None, None, 0.0, 1.0, 1.0]
    assert outputs[4].extra_fields["pivottrace"]["failed"] == 2
    assert "pivottrace" not in outputs[0].extra_fields


def test_a_group_of_which_one_rollout_is_left_has_no_vote() -> None:
    worker = Worker(2)
    worker._rollouts["u", 1].turn(2).aborted = True
    outputs = [answers(7), answers(7)]
    assert together(worker, *outputs) == [0.0, None]
    assert outputs[0].extra_fields["pivottrace"]["outcome"] == "no_vote"


def test_all_trajectories_of_a_rollout_carry_its_weight_and_one_its_record() -> None:
    worker = Worker(2)
    first, last = rollout([1, 1, 1]), rollout([0, 1], [0.0, -2.0])
    last.response_ids[1] = 7
    assert together(worker, (first, last), answers(7)) == [1.0, 1.0]
    assert first.extra_fields["pivottrace"] == {"route": "self_train", "weight": 1.0}
    record = last.extra_fields["pivottrace"]
    assert (record["n_tokens"], record["logprob"], record["traced"]) == (4, -2.0, False)


def test_a_reward_function_that_tells_no_answer_fails_the_rollouts() -> None:
    assert together(Worker(2, said=("score",)), answers(7), answers(7)) == [None, None]


def test_request_seeds_depend_on_prompt_step_and_rollout_only() -> None:
    seeds = {
        agent_loop.request_seed(seed, pt_id, step, session)
        for seed in (0, 1)
        for pt_id in ("a", "b")
        for step in (1, 2)
        for session in (0, 1)
    }
    assert len(seeds) == 16 and all(0 <= s < 2**31 for s in seeds)
    assert agent_loop.request_seed(0, "a", 1, 0) == agent_loop.request_seed(0, "a", 1, 0)
