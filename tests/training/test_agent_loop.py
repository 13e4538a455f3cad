"""The group hook: what becomes of the sessions of one prompt."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import ray

from pivottrace_verl.errors import PivotTraceError

agent_loop = pytest.importorskip(
    "pivottrace_verl.training.agent_loop", reason="verl is not installed"
)

from verl.workers.rollout.replica import TokenOutput  # noqa: E402

from tests.group_hook import HookWorker, outputs_of  # noqa: E402


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


def test_the_mean_log_probability_is_of_what_the_policy_generated() -> None:
    turns = rollout([1, 0, 0, 1], [-1.0, 5.0, 5.0, -3.0])
    assert agent_loop.mean_logprob([turns]) == -2.0
    assert agent_loop.mean_logprob([turns, rollout([1], [-8.0])]) == -4.0
    assert agent_loop.mean_logprob([rollout([1, 1])]) is None
    assert agent_loop.mean_logprob([rollout([0], [0.0])]) is None


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


class Tokenizer:
    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return f"#### {tokens[0]}"


def answers(first: int, mask: list[int] | None = None) -> Any:
    output = rollout(mask or [1, 1])
    output.response_ids[0] = first
    return output


def make(
    *sessions: Any,
    says: Callable[[str], Any] = lambda answer: {"pred": answer, "score": 0.0},
    adds: Callable[[Any], float] = lambda output: 0.0,
    aborted: Sequence[int] = (),
    **settings: Any,
) -> HookWorker:
    """A worker whose sessions give these outputs. The reward function reads the first token of what
    it is given as the answer; `says` makes of that what it returns, `adds` is what the reward
    manager adds to its score."""
    agent = outputs_of(sessions)

    def generate(rollout: Any, uid: str, session: int) -> list[Any]:
        if session in aborted:
            rollout.turn(2).aborted = True
        return agent(rollout, uid, session)

    def score(output: Any) -> tuple[float, dict[str, Any]]:
        result = says(str(output.response_ids[0]))
        # As verl's reward managers do.
        info = dict(result) if isinstance(result, dict) else {"acc": result}
        found = result["score"] if isinstance(result, dict) else result
        return found + adds(output), info

    return HookWorker(generate, score, tokenizer=Tokenizer(), **settings)


def become(worker: HookWorker, size: int, validate: bool = False) -> list[Any]:
    return asyncio.run(asyncio.wait_for(worker.prompt(size, validate), timeout=10))


def together(*sessions: Any, **settings: Any) -> list[Any]:
    """What becomes of each session of a group: its reward, None without a trajectory, its error."""
    return become(make(*sessions, **settings), len(sessions))


def record(output: Any) -> dict[str, Any]:
    return dict(output.extra_fields["pivottrace"])


def test_a_rollout_that_was_aborted_or_is_empty_ends_without_vote_trajectory_or_error() -> None:
    outputs = [answers(9), rollout([]), answers(9), answers(7), answers(7), ()]
    # With the aborted one 9 and 7 would tie. An error would cost the group in an async trainer.
    assert together(*outputs, aborted=[0]) == [None, None, 0.0, 1.0, 1.0, None]
    assert record(outputs[4])["failed"] == 3
    assert "pivottrace" not in outputs[0].extra_fields


def test_a_group_of_which_no_rollout_is_left_fails_with_the_last_of_them() -> None:
    first, second, third = together(answers(9), rollout([]), answers(7), aborted=[0, 2])
    assert (first, second) == (None, None)
    assert isinstance(third, RuntimeError) and "Rollout 2 of prompt p failed: the eng" in str(third)


def test_a_group_of_which_one_rollout_is_left_has_no_vote_and_teaches_nothing() -> None:
    outputs = [answers(7), answers(7)]
    assert together(*outputs, aborted=[1]) == [0.0, None]
    assert (record(outputs[0])["outcome"], record(outputs[0])["weight"]) == ("no_vote", 0.0)


def test_each_record_has_the_trace_of_its_own_rollout() -> None:
    traces: list[list[Any]] = [[3], [None], [0, 2], [5], [7]]
    outputs = [answers(7), answers(7), answers(7), answers(7), answers(9)]
    worker = make(*outputs, aborted=[3])
    agent = worker.generate

    def generate(rollout: Any, uid: str, session: int) -> list[Any]:
        # Of each turn a signal of so many steps, far from each other.
        for steps in traces[session]:
            part = None
            if steps is not None:
                signal = np.repeat(np.arange(steps + 1.0), 10)
                part = {"signal": signal, "entropy_sum": float(steps * len(signal))}
            turn = rollout.turn(2)
            turn.take(TokenOutput(token_ids=[1], extra_fields={"pivottrace": part}))
        return agent(rollout, uid, session)

    worker.generate = generate
    assert become(worker, 5) == [1.0, 1.0, 1.0, None, 0.0]
    names = ("traced", "pivots", "pivot_density", "entropy")
    found = [tuple(record(outputs[i]).get(name) for name in names) for i in (0, 1, 2, 4)]
    assert found == [
        (True, 3, 3 / 40, 3.0),
        (False, None, None, None),
        (True, 2, 2 / 40, 1.5),
        (True, 7, 7 / 80, 7.0),
    ]


def test_all_trajectories_of_a_rollout_carry_its_weight_and_one_its_record() -> None:
    first, last = rollout([1, 1, 1]), rollout([0, 1], [0.0, -2.0])
    last.response_ids[1] = 7
    assert together((first, last), answers(7)) == [1.0, 1.0]
    assert first.extra_fields["pivottrace"] == {"route": "self_train", "weight": 1.0}
    found = record(last)
    assert (found["n_tokens"], found["logprob"], found["traced"]) == (4, -2.0, False)


def test_what_was_not_compared_in_time_teaches_nothing_and_looks_like_the_others() -> None:
    says = {
        "7": {"pred": "7", "score": 1.0, "acc": 1.0, "timed_out": 0.0},
        "8": {"pred": "8", "score": 0.0, "acc": 0.0, "timed_out": 1.0},
    }
    for labeled in (True, False):
        outputs = [answers(7), answers(7), answers(8), answers(7)]
        assert together(*outputs, says=says.__getitem__, labeled=labeled) == [1.0] * 4
        assert [record(o)["weight"] for o in outputs] == [1.0, 1.0, 0.0, 1.0]
        assert [record(o)["right"] for o in outputs] == [1.0, 1.0, None, 1.0]
        infos = [o.extra_fields["reward_extra_info"] for o in outputs]
        # verl's filter sees a group of one value.
        assert [(i["score"], i["acc"]) for i in infos] == [(1.0, 1.0)] * 4


def graded(answer: str) -> float:
    """A reward function that returns a bare score: 7 is right."""
    return 1.0 if answer == "7" else -1.0


@pytest.mark.parametrize(
    "says",
    [
        graded,
        lambda answer: {"score": graded(answer)},
        # As verl's math_dapo.
        lambda answer: {"score": graded(answer), "acc": answer == "7", "pred": answer},
    ],
)
def test_any_reward_function_of_verls_trains_labelled_prompts_and_votes_are_read_by_us(
    says: Callable[[str], Any],
) -> None:
    outputs = [answers(9), answers(7), answers(9)]
    assert together(*outputs, says=says, labeled=True) == [-1.0, 1.0, -1.0]
    assert [record(o)["right"] for o in outputs] == [0.0, 1.0, 0.0]
    assert record(outputs[0])["majority_right"] is False
    assert record(outputs[0])["agreement"] == pytest.approx(2 / 3)
    outputs = [answers(9), answers(7), answers(9)]
    assert together(*outputs, says=says) == [1.0, 0.0, 1.0]
    info = outputs[0].extra_fields["reward_extra_info"]
    assert (info["score"], info["acc"]) == (1.0, 1.0)


def test_a_reward_that_the_agent_loop_gave_is_trained_on() -> None:
    outputs = [answers(9), answers(7)]
    for output, reward in zip(outputs, (0.25, 0.75), strict=True):
        output.reward_score = reward
    assert together(*outputs, labeled=True) == [0.25, 0.75]
    assert [record(o)["right"] for o in outputs] == [0.0, 1.0]


@pytest.mark.parametrize("pred", ["", None, "[INVALID]"])
def test_a_group_does_not_agree_on_having_no_answer(pred: Any) -> None:
    outputs = [answers(1), answers(2), answers(3)]
    assert together(*outputs, says=lambda _: {"pred": pred, "score": 0.0}) == [0.0] * 3
    assert record(outputs[0])["outcome"] == "no_vote"


def late(output: Any) -> float:
    """A penalty of responses of more than two tokens, as DAPO's manager has one."""
    return -0.5 if len(output.response_ids) > 2 else 0.0


def test_what_the_reward_manager_adds_is_kept_beside_label_and_vote_but_is_not_the_score() -> None:
    for labeled in (True, False):
        outputs = [answers(7), answers(7, [1, 1, 1]), answers(9), answers(9, [1] * 4), answers(7)]
        says = {"7": {"pred": "7", "score": 1.0, "acc": 1.0},
                "9": {"pred": "9", "score": 0.0, "acc": 0.0}}  # fmt: skip
        found = together(*outputs, says=says.__getitem__, adds=late, labeled=labeled)
        assert found == [1.0, 0.5, 0.0, -0.5, 1.0]
        infos = [o.extra_fields["reward_extra_info"] for o in outputs]
        assert [i["acc"] for i in infos] == [i["score"] for i in infos] == [1, 1, 0, 0, 1]
        assert [record(o)["right"] for o in outputs] == [1, 1, 0, 0, 1]
        assert record(outputs[0])["majority_right"] is (True if labeled else None)


def test_a_waiting_prompt_teaches_nothing() -> None:
    outputs = [answers(7), answers(7), answers(7)]
    assert together(*outputs, route="annotate", otherwise="soft") == [0.0] * 3
    assert {(record(o)["outcome"], record(o)["weight"]) for o in outputs} == {("dropped", 0.0)}


def test_one_rollout_of_a_labelled_prompt_is_trained_on_as_it_is() -> None:
    output = answers(7)
    assert together(output, says=graded, labeled=True) == [1.0]
    assert (record(output)["right"], record(output)["weight"]) == (1.0, 1.0)


def refuses(answer: str) -> Any:
    raise PivotTraceError("The answers cannot be compared.")


def breaks(answer: str) -> Any:
    # As Ray raises what a reward worker raised.
    raise ray.exceptions.RayTaskError("score", "a traceback", ValueError("no truth"))


@pytest.mark.parametrize(
    ("says", "labeled", "sentence"),
    [
        (refuses, True, r"^The answers cannot be compared\.$"),
        (refuses, False, r"^The answers cannot be compared\.$"),
        (breaks, False, r"prompt p, which has no label \(ValueError: no truth\): where ground_tr"),
        (breaks, True, None),
    ],
)
def test_what_would_fail_every_rollout_is_told_to_whoever_watches(
    says: Callable[[str], Any], labeled: bool, sentence: str | None
) -> None:
    worker = make(answers(7), answers(7), says=says, labeled=labeled)
    assert all(isinstance(error, Exception) for error in become(worker, 2))
    if sentence is None:
        # One of verl's failed rollouts, as in stock verl.
        asyncio.run(worker.pivottrace_watch(0.01))
    else:
        with pytest.raises(PivotTraceError, match=sentence):
            asyncio.run(worker.pivottrace_watch(60.0))


def test_validation_passes_through_untouched_but_for_what_is_told_to_whoever_watches() -> None:
    outputs = [answers(7), rollout([])]
    outputs[1].reward_score = 0.5
    worker = make(*outputs, says=graded)
    assert become(worker, 2, validate=True) == [1.0, 0.5]
    assert outputs[0].extra_fields["reward_extra_info"] == {"acc": 1.0}
    assert all("pivottrace" not in output.extra_fields for output in outputs)
    asyncio.run(worker.pivottrace_watch(0.01))
    worker = make(answers(7), says=refuses)
    assert isinstance(become(worker, 1, validate=True)[0], PivotTraceError)
    with pytest.raises(PivotTraceError, match="cannot be compared"):
        asyncio.run(worker.pivottrace_watch(60.0))


def test_the_watch_ends_at_once_when_a_session_is_refused_meanwhile() -> None:
    worker = make(answers(7), answers(7), says=refuses)

    async def run() -> None:
        watch = asyncio.ensure_future(worker.pivottrace_watch(60.0))
        await asyncio.sleep(0)
        await worker.prompt(2)
        await watch

    with pytest.raises(PivotTraceError, match=r"cannot be compared\.$"):
        asyncio.run(asyncio.wait_for(run(), timeout=10))


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
