"""One vLLM engine outside of training: seeded rollouts, with their attention traces if asked for.

Contract: a request carries its own sampling seed, so what it generates does not depend on what
else is in the batch (up to floating-point ties). Used by `scoring` and `evaluation`; in training
the rollouts come from verl's servers.
Axes: T generated tokens of a rollout.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from pivottrace_verl.attention.config import WITHOUT_CAPTURE
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.plugin import disabled

if TYPE_CHECKING:
    from pivottrace_verl.attention.channel import Trace
    from pivottrace_verl.attention.config import CaptureConfig


@dataclass(frozen=True)
class Request:
    """One rollout to generate."""

    prompt_ids: list[int]
    seed: int
    temperature: float = 1.0


@dataclass(frozen=True)
class Rollout:
    """One generated rollout."""

    token_ids: list[int]
    text: str
    truncated: bool
    logprob_mean: float
    """Mean log-probability of the generated tokens, in nats."""
    trace: Trace | None
    """None if capture was off, or the trace was lost or did not arrive in time."""


CPU_ENVIRONMENT = {
    # GiB of KV cache; without it vLLM takes half of the machine's memory.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # This process takes a core of its own while the engine computes.
    "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2)),
    # vLLM compiles its sampler on first use even with enforce_eager: 10 s of C++ compiler.
    "TORCHDYNAMO_DISABLE": "1",
}


class Engine:
    """A vLLM engine, closed by the `with` statement.

    `max_tokens` bounds every rollout; the context is prompt plus that. On a CPU build the engine
    runs in float32 and eagerly; elsewhere vLLM's defaults hold. `trace_timeout` is the longest wait
    for the traces of a call of `generate`, in seconds after its last rollout; `shares_device` says
    that `resting` will be used. `options` are vLLM's own engine arguments, such as
    `tensor_parallel_size`, over what is chosen here.
    """

    def __init__(
        self,
        model: Path,
        *,
        max_prompt_tokens: int,
        max_tokens: int,
        capture: CaptureConfig | None = None,
        max_num_seqs: int = 256,
        trace_timeout: float = 30.0,
        shares_device: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if capture is not None and disabled():
            raise PivotTraceError(
                "PIVOTTRACE_DISABLE=1 switches attention capture off: unset it, or score with "
                "--capture replay or --capture off."
            )
        self._chosen = dict(options or {})
        self._receiver: Any = None
        self._timeout = trace_timeout
        self._shares_device = shares_device
        self._max_tokens = max_tokens
        self._model = str(model)
        self._options: dict[str, Any] = {
            "max_model_len": max_prompt_tokens + max_tokens,
            "max_num_seqs": max_num_seqs,
            "disable_log_stats": True,
        }
        self._capture = capture
        self._llm: Any = None
        self.seconds_generating = 0.0
        """Time spent in vLLM since the engine started, of which nothing is our own work."""

    def __enter__(self) -> Engine:
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        if self._capture is not None:
            from pivottrace_verl.attention.channel import Receiver

            # Before the engine: its processes inherit the endpoint from the environment. No bound:
            # every trace is asked for, so all that can wait is what a call of `generate` returns.
            self._receiver = Receiver(self._capture, max_bytes=None)
            self._receiver.start()
        from vllm import LLM
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            # In time: the engine's process is started below and inherits them.
            for name, value in CPU_ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            self._options.update(
                dtype="float32",
                enforce_eager=True,
                # Small blocks: what attention and capture read of a short context is less padding.
                block_size=32,
                # One engine process, not two: a message queue at every token costs more than it
                # brings.
                distributed_executor_backend=(
                    "uni" if self._chosen.get("tensor_parallel_size", 1) == 1 else "mp"
                ),
                # vLLM 0.28 rewinds the generator of a seeded request whose prompt is prefilled in
                # chunks by its offset, which a CPU generator does not have
                # (v1/worker/gpu_model_runner.py, _bookkeeping_sync).
                enable_chunked_prefill=False,
                max_num_batched_tokens=max(8192, self._options["max_model_len"]),
            )
        elif self._shares_device:
            self._options["enable_sleep_mode"] = True
        try:
            self._llm = LLM(model=self._model, **{**self._options, **self._chosen})
        except (TypeError, ValueError) as error:
            if self._receiver is not None:
                self._receiver.close()
            if not self._chosen:
                raise
            given = ", ".join(f"{name}={value!r}" for name, value in self._chosen.items())
            raise PivotTraceError(f"vLLM does not start with {given} ({error}).") from error
        except RuntimeError as error:
            if self._receiver is None:
                raise
            self._receiver.close()
            # What its processes refuse, they say in their own log.
            raise PivotTraceError(
                f"vLLM did not start with attention capture on, and its log above says why "
                f"({error}); {WITHOUT_CAPTURE}."
            ) from error
        if self._receiver is not None:
            # A plugin that did not load must be told now, not as one missing trace after another.
            self._receiver.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Inside, a GPU's memory is free for others: vLLM keeps its weights in the machine's memory
        meanwhile. Needs `shares_device`; on a CPU nothing happens."""
        if "enable_sleep_mode" not in self._options:
            yield
            return
        self._llm.sleep(level=1)
        try:
            yield
        finally:
            self._llm.wake_up()

    @property
    def trace_counts(self) -> dict[str, int]:
        """`channel.Receiver.counters` since the engine started; empty without capture."""
        return {} if self._receiver is None else dict(self._receiver.counters)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self._llm.get_tokenizer()

    def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a chat prompt, ready to be continued by the assistant."""
        ids = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return list(ids)

    def generate(self, requests: Sequence[Request]) -> list[Rollout]:
        """Generate all requests; the results are in their order.

        What comes out depends on these requests alone: the engine forgets the prefixes of earlier
        ones, and starts when all of these are in its queue. Otherwise the shapes of its batches,
        on which the last bits of a number may depend, would hang on its history and on the clock.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        run = uuid4().hex[:8]
        keys = [f"{run}-{i}" for i in range(len(requests))]
        params = [
            SamplingParams(
                temperature=request.temperature,
                seed=request.seed,
                max_tokens=self._max_tokens,
                logprobs=0,
                extra_args={"pivottrace": {"key": key}} if self._receiver is not None else None,
            )
            for request, key in zip(requests, keys, strict=True)
        ]
        prompts = [TokensPrompt(prompt_token_ids=request.prompt_ids) for request in requests]
        start = time.monotonic()
        self._llm.reset_prefix_cache()
        self._llm.sleep(level=0)  # queue, do not schedule
        self._llm.enqueue(prompts, params, use_tqdm=False)
        self._llm.wake_up(tags=["scheduling"])
        outputs = self._llm.wait_for_completion(use_tqdm=False)
        end = time.monotonic()
        self.seconds_generating += end - start
        return [
            self._rollout(output.outputs[0], key, end + self._timeout)
            for output, key in zip(outputs, keys, strict=True)
        ]

    def _rollout(self, completion: Any, key: str, deadline: float) -> Rollout:
        ids = list(completion.token_ids)
        trace = None
        if self._receiver is not None:
            left = max(0.0, deadline - time.monotonic())
            trace = self._receiver.get(key, n_tokens=len(ids), timeout=left)
        logprobs = [s[token].logprob for token, s in zip(ids, completion.logprobs, strict=True)]
        return Rollout(
            token_ids=ids,
            text=completion.text,
            truncated=completion.finish_reason == "length",
            logprob_mean=sum(logprobs) / max(len(logprobs), 1),
            trace=trace,
        )
