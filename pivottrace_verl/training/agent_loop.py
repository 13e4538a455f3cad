"""The group hook: verl's agent-loop worker, holding each prompt's rollouts until all are judged.

Contract: verl runs the sessions of one prompt as coroutines of one worker. Here each session is
scored by verl's own reward workers, then waits for its siblings; the group is judged once
(`groups.judge`), every session gets its reward and a record of it under
`extra_fields["pivottrace"]`, and verl publishes them as it always does. A session that fails
leaves the group, so nobody waits for it for ever; so does one that the engine gave up or that has
no token: it has no answer that could be right or wrong. Where an agent loop has several turns, the
answer is read from the last of them only, never from what a tool said. Validation passes through
untouched.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import time
from collections.abc import Sequence
from typing import Any
from uuid import uuid4

import numpy as np
import ray
from omegaconf import OmegaConf
from verl.experimental.agent_loop import AgentLoopOutput
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ

from pivottrace_verl.answers import TIMED_OUT, get_answers
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.pivots import DetectorConfig
from pivottrace_verl.training.client import PivotClient, Rollout, tracing
from pivottrace_verl.training.groups import DROPPED, Verdict, VotePolicy, judge

# verl exports the Ray actor class; its methods live on the class underneath.
_Worker: Any = AgentLoopWorkerTQ.__ray_metadata__.modified_class


class Group:
    """The rollouts of one prompt on their way to one verdict."""

    def __init__(self, size: int) -> None:
        self._size = self._waiting_for = size
        self._arrived: dict[int, AgentLoopOutput] = {}
        self._weights: dict[int, float | None] = {}
        self._complete = asyncio.Event()
        self._verdict: asyncio.Task[Verdict] | None = None
        self.seconds = 0.0
        """Spent on the verdict."""

    @property
    def failed(self) -> int:
        """Sessions that left, once the group is complete."""
        return self._size - len(self._arrived)

    def arrive(self, session: int, output: AgentLoopOutput, weight: float | None = None) -> None:
        """A scored rollout is in; `weight` is that of its vote."""
        self._arrived[session] = output
        self._weights[session] = weight
        self._count_down()

    def leave(self, session: int) -> None:
        """A session failed; the others vote without it."""
        if session not in self._arrived:
            self._count_down()

    def _count_down(self) -> None:
        self._waiting_for -= 1
        if self._waiting_for <= 0:
            self._complete.set()

    async def reward(
        self, session: int, *, labeled: bool, kind: Any, policy: VotePolicy
    ) -> tuple[float, bool, Verdict]:
        """This session's reward, whether it timed out, and the verdict both come from, once the
        group is complete."""
        await self._complete.wait()
        order = sorted(self._arrived)
        if self._verdict is None:
            infos = [self._arrived[s].extra_fields["reward_extra_info"] for s in order]

            def decide() -> Verdict:
                start = time.perf_counter()
                verdict = judge(
                    [TIMED_OUT if i.get("timed_out") else i["pred"] or None for i in infos],
                    [float(info["score"]) for info in infos],
                    labeled=labeled,
                    kind=kind,
                    policy=policy,
                    weights=[self._weights[s] for s in order],
                )
                self.seconds = time.perf_counter() - start
                return verdict

            # Equivalence of mathematical answers can take milliseconds: off the event loop.
            self._verdict = asyncio.ensure_future(asyncio.to_thread(decide))
        verdict = await self._verdict
        place = order.index(session)
        return verdict.rewards[place], verdict.timed_out[place], verdict


class PivotAgentLoopWorker(_Worker):
    """verl's worker with the group hook and the opt-in for capture."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = self.config.pivottrace
        self._kind = get_answers(settings.answers)
        self._policy = VotePolicy(**settings.vote)
        # A prompt that waits for its label has neither a label nor a vote that is trusted.
        self._waiting = dataclasses.replace(self._policy, kind="verified_only")
        self._logprobs = self._policy.kind == "weighted" or settings.retriage.enable
        self._capture = bool(settings.capture.enable)
        detector: Any = OmegaConf.to_container(settings.detector, resolve=True)
        self._detector = DetectorConfig.from_dict(detector)
        self._seed: int | None = settings.request_seed
        self._groups: dict[str, Group] = {}
        self._rollouts: dict[tuple[str, int], Rollout] = {}

    async def _run_prompt(
        self, prompt: dict, sampling_params: dict, trajectory: dict, trace: bool = False
    ) -> None:
        if trajectory["validate"]:
            await super()._run_prompt(prompt, sampling_params, trajectory, trace)
            return
        uid = prompt["uid"]
        size = prompt.get("__rollout_n__", self.config.actor_rollout_ref.rollout.n)
        self._groups[uid] = Group(int(size))
        try:
            await super()._run_prompt(prompt, sampling_params, trajectory, trace)
        finally:
            del self._groups[uid]

    async def _run_agent_loop(
        self,
        sampling_params: dict[str, Any],
        trajectory: dict[str, Any],
        *,
        agent_name: str,
        trace: bool = True,
        **kwargs: Any,
    ) -> Any:
        if trajectory["validate"]:
            return await super()._run_agent_loop(
                sampling_params, trajectory, agent_name=agent_name, trace=trace, **kwargs
            )
        uid, session = kwargs["uid"], kwargs["session_id"]
        seed = None
        if self._seed is not None:
            pt_id = kwargs["extra_info"]["pt_id"]
            seed = request_seed(self._seed, pt_id, trajectory["step"], session)
        rollout = Rollout(f"{uid}-{session}-{uuid4().hex[:8]}", capture=self._capture, seed=seed)
        self._rollouts[uid, session] = rollout
        try:
            with tracing(rollout):
                return await super()._run_agent_loop(
                    sampling_params, trajectory, agent_name=agent_name, trace=trace, **kwargs
                )
        except BaseException:
            self._groups[uid].leave(session)
            raise
        finally:
            del self._rollouts[uid, session]

    async def _agent_loop_postprocess(
        self, output: AgentLoopOutput | list[AgentLoopOutput], validate: bool, **kwargs: Any
    ) -> None:
        outputs = output if isinstance(output, list) else [output]
        if not validate and outputs:
            await self._judge(outputs, kwargs)
        elif not validate:
            self._groups[kwargs["uid"]].leave(kwargs["session_id"])
        await super()._agent_loop_postprocess(output, validate, **kwargs)

    async def _judge(self, outputs: list[AgentLoopOutput], kwargs: dict[str, Any]) -> None:
        uid, session, info = kwargs["uid"], kwargs["session_id"], kwargs["extra_info"]
        group, rollout, final = self._groups[uid], self._rollouts[uid, session], outputs[-1]
        if rollout.aborted or not any(final.response_mask):
            what = "the engine aborted it" if rollout.aborted else "it has no tokens"
            raise RuntimeError(f"Rollout {session} of prompt {info['pt_id']} failed: {what}.")
        scored = last_turn(final)
        await self._compute_score([*outputs[:-1], scored], kwargs=kwargs)
        if "pred" not in final.extra_fields.get("reward_extra_info", {}):
            raise PivotTraceError(
                "The reward function returned no 'pred', the answer that it read from the rollout "
                "('' if there is none), so no vote can be taken; see "
                "pivottrace_verl.training.reward."
            )
        n_tokens, mean = generated(outputs)
        traced = rollout.summary(self._detector)
        logprob = mean if self._logprobs else None
        group.arrive(session, final, self._policy.weight_of(logprob, traced.get("pivots")))
        waits = info["route"] == "annotate" and not info["labeled"]
        reward, timed_out, verdict = await group.reward(
            session,
            labeled=info["labeled"],
            kind=self._kind,
            policy=self._waiting if waits else self._policy,
        )
        final.reward_score = reward
        # `score` and `acc` are what verl logs and filters groups by: they follow the reward used.
        final.extra_fields["reward_extra_info"].update(score=reward, acc=reward)
        # The trainer multiplies it by the route's.
        scale = {"route": info["route"], "weight": float(verdict.outcome != DROPPED)}
        for output in outputs[:-1]:
            output.extra_fields["pivottrace"] = scale
        final.extra_fields["pivottrace"] = {
            **traced,
            **scale,
            "pt_id": info["pt_id"],
            "labeled": bool(info["labeled"]),
            "reward": reward,
            "outcome": verdict.outcome,
            "timed_out": timed_out,
            "agreement": verdict.agreement,
            "answer_entropy": verdict.answer_entropy,
            "majority_right": verdict.majority_right,
            "votes": verdict.votes,
            "n_tokens": n_tokens,
            "logprob": logprob,
            "failed": group.failed,
            "vote_s": group.seconds / len(verdict.rewards),
        }


def last_turn(output: AgentLoopOutput) -> AgentLoopOutput:
    """The rollout with nothing of its response left but the last stretch that the policy generated;
    itself where that is all. What a scorer writes into its `extra_fields`, the rollout has.
    """
    mask = np.asarray(output.response_mask, dtype=bool)
    if mask.all() or not mask.any():
        return output
    end = int(np.flatnonzero(mask)[-1]) + 1
    foreign = np.flatnonzero(~mask[:end])
    first = int(foreign[-1]) + 1 if len(foreign) else 0
    changed = {
        "prompt_ids": [*output.prompt_ids, *output.response_ids[:first]],
        "response_ids": output.response_ids[first:end],
        "response_mask": output.response_mask[first:end],
    }
    return output.model_copy(update=changed)


def generated(outputs: Sequence[AgentLoopOutput]) -> tuple[int, float | None]:
    """How many of a rollout's tokens the policy generated, and their mean log-probability; None
    where verl was not asked for it (`rollout.calculate_log_probs`) or there is none."""
    masks = [np.asarray(output.response_mask, dtype=bool) for output in outputs]
    n_tokens = int(sum(mask.sum() for mask in masks))
    values = [
        np.asarray(output.response_logprobs, dtype=np.float64)[mask]
        for output, mask in zip(outputs, masks, strict=True)
        if output.response_logprobs
    ]
    known = np.concatenate(values) if values else np.zeros(0)
    return n_tokens, float(known.mean()) if len(known) else None


def request_seed(seed: int, pt_id: str, step: int, session: int) -> int:
    """A sampling seed in [0, 2**31) that depends on what is sampled, not on when it is."""
    digest = hashlib.sha256(f"{seed}/{pt_id}/{step}/{session}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


class PivotAgentLoopManager(AgentLoopManagerTQ):
    """verl's manager, starting our workers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.llm_client, PivotClient):
            raise PivotTraceError(
                f"The trainer's LLM client is {type(self.llm_client).__name__}, which would lose "
                "the rollouts' traces: get_llm_client must return a client of "
                "pivottrace_verl.training.client."
            )
        self.agent_loop_workers_class = ray.remote(PivotAgentLoopWorker)
