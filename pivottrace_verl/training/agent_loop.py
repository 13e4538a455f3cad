"""The group hook: verl's agent-loop worker, holding each prompt's rollouts until all are judged.

Contract: verl runs the sessions of one prompt as coroutines of one worker. Here each session is
scored by verl's own reward workers, then waits for its siblings; the group is judged once
(`groups.judge`), every session gets its reward and a record of it under
`extra_fields["pivottrace"]`, and verl publishes them as it always does. A session that fails
leaves the group, so nobody waits for it for ever. So does one that the engine gave up or that has
no token, which has no answer that could be right or wrong; it ends without a trajectory and without
an error, unless no sibling is left, because verl's asynchronous trainers throw a group with an
error away. Where an agent loop has several turns, the answer is read from the last of them only,
never from what a tool said. Validation passes through untouched.

A PivotTraceError of a session is kept and told by `pivottrace_watch`: to verl it is one more failed
rollout, but all others will fail like it.

The reward function may be any of verl's: of a labelled prompt its score is trained on as it is,
after the reward manager. `pred`, the answer that it read ("" if there is none), and `timed_out` are
what a vote needs; without `pred` the answer is read here, with `pivottrace.answers`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import compress
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from omegaconf import OmegaConf
from verl.experimental.agent_loop import AgentLoopOutput
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ, AgentLoopWorkerTQ

from pivottrace_verl.answers import TIMED_OUT, Answer, extract_many, get_answers
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.pivots import DetectorConfig
from pivottrace_verl.training.client import PivotClient, Rollout, tracing
from pivottrace_verl.training.gathering import Group, Scored
from pivottrace_verl.training.groups import VERIFIED, VotePolicy

logger = logging.getLogger(__name__)

# verl exports the Ray actor class; its methods live on the class underneath.
_Worker: Any = AgentLoopWorkerTQ.__ray_metadata__.modified_class

_NO_ANSWER = (None, "", "[INVALID]")
"""A reward function's `pred` where it read none; the last is that of verl's `math_dapo`, on which
a group must not agree."""


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
        self._refusal: str | None = None
        self._refused = asyncio.Event()

    async def pivottrace_watch(self, seconds: float) -> None:
        """Return after so many seconds; raise PivotTraceError as soon as a session has."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._refused.wait(), seconds)
        if self._refusal is not None:
            raise PivotTraceError(self._refusal)

    def _refuse(self, error: BaseException) -> None:
        # A reward worker's error is one of Ray's too, and its text a traceback.
        refusal = getattr(error, "cause", error)
        if isinstance(refusal, PivotTraceError) and self._refusal is None:
            self._refusal = str(refusal)
            self._refused.set()

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
            try:
                return await super()._run_agent_loop(
                    sampling_params, trajectory, agent_name=agent_name, trace=trace, **kwargs
                )
            except PivotTraceError as error:
                self._refuse(error)
                raise
        uid, session = kwargs["uid"], kwargs["session_id"]
        seed = None
        if self._seed is not None:
            pt_id = kwargs["extra_info"]["pt_id"]
            seed = request_seed(self._seed, pt_id, trajectory["step"], session)
        rollout = Rollout(
            f"{uid}-{session}-{os.urandom(4).hex()}", capture=self._capture, seed=seed
        )
        self._rollouts[uid, session] = rollout
        try:
            with tracing(rollout):
                return await super()._run_agent_loop(
                    sampling_params, trajectory, agent_name=agent_name, trace=trace, **kwargs
                )
        except BaseException as error:
            self._groups[uid].leave(session)
            self._refuse(error)
            raise
        finally:
            del self._rollouts[uid, session]

    async def _agent_loop_postprocess(
        self, output: AgentLoopOutput | list[AgentLoopOutput], validate: bool, **kwargs: Any
    ) -> None:
        outputs = output if isinstance(output, list) else [output]
        if validate:
            await super()._agent_loop_postprocess(output, validate, **kwargs)
            return
        why = self._no_answer(outputs, kwargs)
        if why is None:
            await self._judge(outputs, kwargs)
            await super()._agent_loop_postprocess(output, validate, **kwargs)
            return
        group, session = self._groups[kwargs["uid"]], kwargs["session_id"]
        said = f"Rollout {session} of prompt {kwargs['extra_info']['pt_id']} failed: {why}."
        group.leave(session)
        if group.all_failed:
            raise RuntimeError(said)
        logger.warning(said)

    def _no_answer(self, outputs: list[AgentLoopOutput], kwargs: dict[str, Any]) -> str | None:
        """Why a rollout has no answer that could be right or wrong, if so."""
        if self._rollouts[kwargs["uid"], kwargs["session_id"]].aborted:
            return "the engine aborted it"
        # verl itself makes nothing of a rollout whose agent loop returns no output.
        if not outputs or not any(outputs[-1].response_mask):
            return "it has no tokens"
        return None

    async def _judge(self, outputs: list[AgentLoopOutput], kwargs: dict[str, Any]) -> None:
        uid, session, info = kwargs["uid"], kwargs["session_id"], kwargs["extra_info"]
        group, rollout, final = self._groups[uid], self._rollouts[uid, session], outputs[-1]
        logprob = mean_logprob(outputs) if self._logprobs else None
        group.arrive(session, await self._score(outputs, kwargs, logprob, rollout.signals()))
        waits = info["route"] == "annotate" and not info["labeled"]
        place, verdict = await group.verdict(
            session,
            labeled=info["labeled"],
            kind=self._kind,
            policy=self._waiting if waits else self._policy,
            detector=self._detector,
        )
        reward, score = verdict.rewards[place], verdict.scores[place]
        final.reward_score = reward
        told = final.extra_fields["reward_extra_info"]
        if verdict.outcome != VERIFIED or verdict.timed_out[place]:
            # What verl logs and filters groups by follows the score used.
            told.update(score=score, acc=score)
        told.setdefault("score", score)
        told.setdefault("acc", score)
        # The trainer multiplies it by the route's.
        scale = {"route": info["route"], "weight": verdict.weights[place]}
        for output in outputs[:-1]:
            output.extra_fields["pivottrace"] = scale
        final.extra_fields["pivottrace"] = {
            **rollout.summary(group.pivots[place]),
            **scale,
            "pt_id": info["pt_id"],
            "labeled": bool(info["labeled"]),
            "reward": reward,
            "right": verdict.right[place],
            "outcome": verdict.outcome,
            "timed_out": verdict.timed_out[place],
            "agreement": verdict.agreement,
            "answer_entropy": verdict.answer_entropy,
            "majority_right": verdict.majority_right,
            "votes": verdict.votes,
            "n_tokens": sum(output.response_mask.count(1) for output in outputs),
            "logprob": logprob,
            "failed": group.failed,
            "vote_s": group.seconds / len(verdict.rewards),
        }

    async def _score(
        self,
        outputs: list[AgentLoopOutput],
        kwargs: dict[str, Any],
        logprob: float | None,
        signals: list[NDArray[Any]] | None,
    ) -> Scored:
        """Ask a reward worker."""
        info, last = kwargs["extra_info"], last_turn(outputs[-1])
        try:
            await self._compute_score([*outputs[:-1], last], kwargs=kwargs)
        except ray.exceptions.RayTaskError as error:
            if info["labeled"] or isinstance(error.cause, PivotTraceError):
                raise
            raise PivotTraceError(
                f"The reward function failed on prompt {info['pt_id']}, which has no label "
                f"({type(error.cause).__name__}: {error.cause}): where ground_truth is None it "
                "must return a score, which is not read, and may return 'pred', the answer."
            ) from error
        told = outputs[-1].extra_fields.setdefault("reward_extra_info", {})
        if "pred" in told:
            pred = told["pred"]
            answer: Answer = None if pred in _NO_ANSWER else str(pred)
        else:
            answer = await asyncio.to_thread(self._read, last.response_ids)
            if info["labeled"] and answer is TIMED_OUT:
                answer = None  # its score is known all the same
        return Scored.of(last.reward_score, told, answer, logprob, signals)

    def _read(self, tokens: list[int]) -> Answer:
        """The answer in a response, as the reward function of our own reads it."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return extract_many(self._kind, [text])[0]


def last_turn(output: AgentLoopOutput) -> AgentLoopOutput:
    """The rollout with nothing of its response left but the last stretch that the policy generated;
    itself where that is all. What a scorer writes into its `extra_fields`, the rollout has.
    """
    # Of the ways to look through a list of small numbers this is the fastest by far.
    n_tokens = output.response_mask.count(1)
    if n_tokens in (0, len(output.response_mask)):
        return output
    mask = np.asarray(output.response_mask, dtype=bool)
    end = int(np.flatnonzero(mask)[-1]) + 1
    foreign = np.flatnonzero(~mask[:end])
    first = int(foreign[-1]) + 1 if len(foreign) else 0
    changed = {
        "prompt_ids": [*output.prompt_ids, *output.response_ids[:first]],
        "response_ids": output.response_ids[first:end],
        "response_mask": output.response_mask[first:end],
    }
    return output.model_copy(update=changed)


def mean_logprob(outputs: Sequence[AgentLoopOutput]) -> float | None:
    """Of the tokens of a rollout that the policy generated; None where verl was not asked for it
    (`rollout.calculate_log_probs`) or there is none."""
    total, n_tokens = 0.0, 0
    for output in outputs:
        if output.response_logprobs:
            n_own = output.response_mask.count(1)
            whole = n_own == len(output.response_mask)
            values = output.response_logprobs
            total += sum(values if whole else compress(values, output.response_mask))
            n_tokens += n_own
    return total / n_tokens if n_tokens else None


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
