"""verl's own reward managers and its way to them, with the group hook behind: what the manager adds
to a score is trained on as in stock verl."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from pivottrace_verl.answers import get_answers
from pivottrace_verl.pivots import DetectorConfig
from pivottrace_verl.training.gathering import Group
from pivottrace_verl.training.groups import VotePolicy

agent_loop = pytest.importorskip(
    "pivottrace_verl.training.agent_loop", reason="verl is not installed"
)

from verl.experimental.reward_loop.reward_manager.dapo import DAPORewardManager  # noqa: E402
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager  # noqa: E402

from pivottrace_verl.training.reward import compute_score  # noqa: E402

ANSWERS = (7, 7, 9, 7, 9)
LENGTHS = (2, 6, 2, 8, 7)
OVERLONG = {"enable": True, "len": 4, "penalty_factor": 0.5, "log": True}
"""Responses of more than 4 of at most 8 tokens lose up to a half."""


class Tokenizer:
    """Token i says i; only the first token says anything."""

    def decode(self, tokens: Any, skip_special_tokens: bool) -> str:
        return str(int(tokens[0]))


def exact(**row: Any) -> dict[str, Any]:
    return compute_score(**row, answers="exact")


def bare(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any) -> float:
    return float(solution_str == ground_truth)


class Worker(agent_loop.PivotAgentLoopWorker):
    """verl's worker as far as it scores, with one reward worker in this process, and the hook."""

    def __init__(self, manager: Any, size: int) -> None:
        async def remote(data: Any) -> Any:
            return await manager.run_single(data)

        handle = SimpleNamespace(compute_score=SimpleNamespace(remote=remote))
        self.reward_loop_worker_handles = [handle]
        self.processor, self.mm_processor_kwargs, self.tokenizer = None, None, Tokenizer()
        self._kind, self._policy = get_answers("exact"), VotePolicy()
        self._waiting, self._logprobs, self._detector = self._policy, False, DetectorConfig(tau=0.1)
        self._groups = {"u": Group(size)}
        self._rollouts = {("u", i): agent_loop.Rollout(f"{i}", capture=True) for i in range(size)}


def group() -> list[Any]:
    return [
        agent_loop.AgentLoopOutput(
            prompt_ids=[1, 2],
            response_ids=[answer, *range(1, length)],
            response_mask=[1] * length,
            metrics={},
            extra_fields={},
        )
        for answer, length in zip(ANSWERS, LENGTHS, strict=True)
    ]


def rows(truth: str | None) -> list[dict[str, Any]]:
    info = {"pt_id": "p", "labeled": truth is not None}
    info["route"] = "annotate" if info["labeled"] else "self_train"
    return [
        {
            "uid": "u",
            "session_id": i,
            "data_source": "sums",
            "reward_model": {"style": "rule", "ground_truth": truth},
            "extra_info": dict(info),
        }
        for i in range(len(ANSWERS))
    ]


def trained_on(manager: Any, function: Any, truth: str | None, hook: bool) -> list[dict[str, Any]]:
    """The fields that verl stores of each rollout of the group, stock or with the hook."""

    async def run() -> list[dict[str, Any]]:
        kwargs = {"overlong_buffer_cfg": OVERLONG, "max_resp_len": 8}
        config = OmegaConf.create({"reward": {"reward_kwargs": kwargs}})
        outputs = group()
        worker = Worker(manager(config, Tokenizer(), function), len(outputs))
        if hook:
            jobs = [worker._judge([o], r) for o, r in zip(outputs, rows(truth), strict=True)]
        else:
            jobs = [
                worker._compute_score([o], kwargs=r)
                for o, r in zip(outputs, rows(truth), strict=True)
            ]
        await asyncio.gather(*jobs)
        return [output.as_dict() for output in outputs]

    return asyncio.run(asyncio.wait_for(run(), timeout=60))


@pytest.mark.filterwarnings("ignore:Pydantic serializer")  # verl's manager gives tensors
@pytest.mark.parametrize("manager", [NaiveRewardManager, DAPORewardManager])
@pytest.mark.parametrize("function", [exact, bare])
def test_of_a_labelled_prompt_verl_stores_the_rewards_of_stock_verl(
    manager: Any, function: Any
) -> None:
    stock = trained_on(manager, function, "7", hook=False)
    ours = trained_on(manager, function, "7", hook=True)
    for one, other in zip(stock, ours, strict=True):
        assert one["rm_scores"].tolist() == other["rm_scores"].tolist()
        told = one["extra_fields"]["reward_extra_info"]
        # Of a bare score verl keeps `acc` only.
        assert other["extra_fields"]["reward_extra_info"] == {"score": told["acc"], **told}
    last = [row["rm_scores"][-1].item() for row in ours]
    penalized = manager is DAPORewardManager
    assert last == ([1.0, 0.75, 0.0, 0.5, -0.375] if penalized else [1.0, 1.0, 0.0, 1.0, 0.0])


@pytest.mark.parametrize("function", [exact, bare])
def test_of_a_prompt_without_a_label_the_vote_is_penalized_like_a_label(function: Any) -> None:
    ours = trained_on(DAPORewardManager, function, None, hook=True)
    assert [row["rm_scores"][-1].item() for row in ours] == [1.0, 0.75, 0.0, 0.5, -0.375]
    told = [row["extra_fields"]["reward_extra_info"] for row in ours]
    assert [row["score"] for row in told] == [row["acc"] for row in told] == [1, 1, 0, 1, 0]
