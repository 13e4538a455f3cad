"""verl's LLM clients, keeping what each engine request of a rollout left of its attention trace.

A rollout is one engine request, unless its agent loop has several turns, or new weights arrive on
the way: verl's asynchronous client then aborts it and goes on with a new request whose prompt is
prompt and tokens so far. Each request captures under a key of its own (and samples with a seed of
its own); here the parts come together again. Requests of one turn are one sequence, and pivots are
found over their joined signal as if it had been one request; turns stand apart, because the text of
a tool comes between them. A part that is missing makes the whole trace missing.

    with tracing(Rollout("key", capture=True)) as rollout:    # in the agent-loop worker
        output = await agent_loop.run(...)                    # calls client.generate
    rollout.signals(), rollout.summary(pivots)

Axes: T generated tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
from numpy.typing import NDArray
from verl.workers.rollout.llm_server import FullyAsyncLLMServerClient, LLMServerClient
from verl.workers.rollout.replica import TokenOutput

_ABORTED = ("abort", "aborted")


class Turn:
    """The engine requests that generated one turn: one, and one more after each abort."""

    def __init__(self, rollout: Rollout, prompt_tokens: int) -> None:
        self._rollout = rollout
        self._prompt_tokens = prompt_tokens
        self.parts: list[Mapping[str, Any] | None] = []
        """Of each request that generated tokens what the server said of its trace."""
        self.aborted = False
        """Whether the last request was."""

    def ask(self, sampling_params: Mapping[str, Any]) -> dict[str, Any]:
        """Sampling parameters of the next request."""
        rollout, params = self._rollout, dict(sampling_params)
        if rollout.capture:
            asked = {
                "key": f"{rollout.key}-{rollout.requests}",
                "prompt_tokens": self._prompt_tokens,
            }
            params["extra_args"] = {**(params.get("extra_args") or {}), "pivottrace": asked}
        if rollout.seed is not None:
            # The same seed again would draw the same random numbers for other tokens.
            params["seed"] = (rollout.seed + rollout.requests) % 2**31
        rollout.requests += 1
        return params

    def take(self, output: TokenOutput) -> None:
        """The answer to the last request."""
        self.aborted = output.stop_reason in _ABORTED
        part = output.extra_fields.pop("pivottrace", None)
        if output.token_ids:
            self.parts.append(part)


class Rollout:
    """The engine requests of one rollout."""

    def __init__(self, key: str, *, capture: bool, seed: int | None = None) -> None:
        self.key = key
        """Unique; that of request i is `<key>-<i>`."""
        self.capture = capture
        self.seed = seed
        """Of the first request; None: the engine's own."""
        self.requests = 0
        self._turns: list[Turn] = []

    def turn(self, prompt_tokens: int) -> Turn:
        """Begin another, on a prompt of so many tokens."""
        self._turns.append(Turn(self, prompt_tokens))
        return self._turns[-1]

    @property
    def aborted(self) -> bool:
        """Whether the engine gave the last turn up: the rollout has no end."""
        return bool(self._turns) and self._turns[-1].aborted

    def signals(self) -> list[NDArray[Any]] | None:
        """The followed signal [T] of each turn that has tokens; None if a part is missing."""
        turns = [turn.parts for turn in self._turns if turn.parts]
        if not turns or any(part is None for turn in turns for part in turn):
            return None
        return [np.concatenate([part["signal"] for part in turn if part]) for turn in turns]

    def summary(self, pivots: int | None) -> dict[str, Any]:
        """What the rollout's record carries of its trace, with so many pivots in its `signals`
        (None: it has none): `traced`, and if so `pivots`, `pivot_density` (per generated token)
        and `entropy` (mean, nats)."""
        if pivots is None:
            return {"traced": False}
        parts = [part for turn in self._turns for part in turn.parts if part]
        n_tokens = sum(len(part["signal"]) for part in parts)
        return {
            "traced": True,
            "pivots": pivots,
            "pivot_density": pivots / n_tokens,
            "entropy": math.fsum(part["entropy_sum"] for part in parts) / n_tokens,
        }


_rollout: ContextVar[Rollout | None] = ContextVar("pivottrace_rollout", default=None)


@contextmanager
def tracing(rollout: Rollout) -> Iterator[Rollout]:
    """Requests of this asyncio task, and of those that it starts, are the rollout's."""
    token = _rollout.set(rollout)
    try:
        yield rollout
    finally:
        _rollout.reset(token)


class PivotClient(LLMServerClient):
    """verl's client of the synchronous trainer: a call is a turn of one request."""

    async def generate(
        self,
        request_id: Any,
        *,
        prompt_ids: list[int],
        sampling_params: dict[str, Any],
        pivottrace_turn: Turn | None = None,
        **kwargs: Any,
    ) -> TokenOutput:
        rollout = _rollout.get()
        if rollout is None:
            return await super().generate(
                request_id, prompt_ids=prompt_ids, sampling_params=sampling_params, **kwargs
            )
        turn = pivottrace_turn or rollout.turn(len(prompt_ids))
        output = await super().generate(
            request_id, prompt_ids=prompt_ids, sampling_params=turn.ask(sampling_params), **kwargs
        )
        turn.take(output)
        return output


class PivotAsyncClient(FullyAsyncLLMServerClient, PivotClient):
    """verl's client of the asynchronous trainers: a call is a turn of as many requests as it
    takes. verl's `generate` calls that of the next class, `PivotClient`, for each."""

    async def generate(
        self, request_id: Any, *, prompt_ids: list[int], **kwargs: Any
    ) -> TokenOutput:
        rollout = _rollout.get()
        if rollout is not None:
            kwargs["pivottrace_turn"] = rollout.turn(len(prompt_ids))
        return await super().generate(request_id, prompt_ids=prompt_ids, **kwargs)
