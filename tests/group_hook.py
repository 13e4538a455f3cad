"""The group hook of the agent-loop worker alone: what verl has around it, its engine, its reward
workers and its store, is given or noted down."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from pivottrace_verl.answers import get_answers
from pivottrace_verl.pivots import DetectorConfig
from pivottrace_verl.training.agent_loop import PivotAgentLoopWorker, _Worker
from pivottrace_verl.training.client import Rollout
from pivottrace_verl.training.groups import VotePolicy

Generate = Callable[[Rollout | None, str, int], list[Any]]
"""The agent loop: the outputs of a session of a prompt, whose requests the rollout keeps, if there
is one."""
Score = Callable[[Any], tuple[float, dict[str, Any]]]
"""What a reward worker says of an output: verl's `reward_score` and `reward_extra_info`."""


class Verl(_Worker):
    """What verl does before and after the hook."""

    generate: Generate
    score: Score

    async def _run_prompt(
        self, prompt: Any, sampling_params: Any, trajectory: Any, *_: Any
    ) -> None:
        n = prompt.pop("__rollout_n__")
        self.became[prompt["uid"]] = await asyncio.gather(
            *(
                self._run_agent_loop(
                    sampling_params, trajectory, agent_name="a", session_id=i, **prompt
                )
                for i in range(n)
            ),
            return_exceptions=True,
        )

    async def _run_agent_loop(self, sampling_params: Any, trajectory: Any, **kwargs: Any) -> Any:
        uid, session = kwargs["uid"], kwargs["session_id"]
        outputs = self.generate(self._rollouts.get((uid, session)), uid, session)
        await self._agent_loop_postprocess(outputs, trajectory["validate"], **kwargs)
        return self.published.get((uid, session))

    async def _compute_score(self, outputs: list[Any], kwargs: Any) -> None:
        if outputs[-1].reward_score is None:
            reward, info = self.score(outputs[-1])
            outputs[-1].reward_score = reward
            outputs[-1].extra_fields["reward_extra_info"] = info

    async def _agent_loop_postprocess(self, output: Any, validate: bool, **kwargs: Any) -> None:
        await self._compute_score(output, kwargs)
        self.published[kwargs["uid"], kwargs["session_id"]] = output[-1].reward_score


class HookWorker(PivotAgentLoopWorker, Verl):
    """The hook between them."""

    def __init__(
        self,
        generate: Generate,
        score: Score,
        *,
        labeled: bool = False,
        route: str = "self_train",
        answers: str = "exact",
        logprobs: bool = True,
        tokenizer: Any = None,
        **policy: Any,
    ) -> None:
        self.generate, self.score = generate, score
        self.became: dict[str, list[Any]] = {}
        self.published: dict[tuple[str, int], float] = {}
        self.config = SimpleNamespace(
            actor_rollout_ref=SimpleNamespace(rollout=SimpleNamespace(n=1))
        )
        self._info = {"pt_id": "p", "route": route, "labeled": labeled}
        self._kind, self._policy = get_answers(answers), VotePolicy(**policy)
        self._waiting = VotePolicy(kind="verified_only")
        self._logprobs, self._detector = logprobs, DetectorConfig(tau=0.1)
        self._capture, self._seed, self.tokenizer = True, None, tokenizer
        self._refusal, self._refused = None, asyncio.Event()
        self._groups, self._rollouts = {}, {}

    async def prompt(self, size: int, validate: bool = False) -> list[Any]:
        """Of each session of a prompt its reward, None where it published no rollout, or its
        error."""
        prompt = {"uid": "u", "extra_info": self._info, "__rollout_n__": size}
        await self._run_prompt(prompt, {}, {"validate": validate, "step": 1})
        return self.became["u"]


def outputs_of(sessions: Sequence[Any]) -> Generate:
    """An agent loop that gives each session of a prompt its output, or several."""

    def generate(rollout: Rollout | None, uid: str, session: int) -> list[Any]:
        found = sessions[session]
        return list(found) if isinstance(found, tuple) else [found]

    return generate
