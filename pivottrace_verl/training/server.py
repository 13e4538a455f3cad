"""verl's vLLM server, returning what pivots are found in with each request that asked for it.

The engine's workers push raw traces to this process (`attention.channel`); here they become the one
signal that the run's frozen detector follows, a number a token, which travels on through
`TokenOutput.extra_fields["pivottrace"]` and is joined with the rollout's other requests by the
client. A trace that does not arrive within the bounded wait is None there, never invented.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from omegaconf import OmegaConf
from verl.workers.rollout.replica import TokenOutput
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

from pivottrace_verl.attention.channel import Receiver, Trace
from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.pivots import DetectorConfig, signal
from pivottrace_verl.training.watch import LOST


class PivotVLLMServer(vLLMHttpServer):
    """One rollout engine's server."""

    async def launch_server(self, *args: Any, **kwargs: Any) -> Any:
        settings = self.config.custom["pivottrace"]
        if not isinstance(settings, dict):
            settings = OmegaConf.to_container(settings, resolve=True)
        capture = dict(settings["capture"])
        self._pt_receiver: Receiver | None = None
        self._pt_timeout = float(capture.pop("timeout_s"))
        self._pt_detector = DetectorConfig.from_dict(settings["detector"])
        if capture.pop("enable"):
            if self.nnodes > 1:
                raise PivotTraceError(
                    f"A rollout replica that spans {self.nnodes} machines cannot capture "
                    f"attention: traces do not leave the machine of the worker that captured them. "
                    f"Let a replica fit one machine, or set pivottrace.capture.enable=False."
                )
            # Before the engine starts: its processes inherit the endpoint from the environment.
            self._pt_receiver = Receiver(CaptureConfig.from_dict(capture))
            self._pt_receiver.start()
        launched = await super().launch_server(*args, **kwargs)
        if self._pt_receiver is not None and self.node_rank == 0:
            # A plugin that did not load must be told now, not as one missing trace after another.
            await asyncio.to_thread(
                self._pt_receiver.wait_ready, engines=self.config.data_parallel_size
            )
        return launched

    async def generate(
        self, prompt_ids: Any, sampling_params: dict, request_id: str, **kwargs: Any
    ) -> TokenOutput:
        asked = (sampling_params.get("extra_args") or {}).get("pivottrace")
        tokens = False
        try:
            output = await super().generate(prompt_ids, sampling_params, request_id, **kwargs)
            tokens = bool(output.token_ids)
        finally:
            if asked and self._pt_receiver is not None and not tokens:
                # Failed, cancelled, or aborted before its first token.
                self._pt_receiver.give_up(asked["key"])
        if asked and self._pt_receiver is not None and tokens:
            trace = await self._pt_receiver.aget(
                asked["key"], n_tokens=len(output.token_ids), timeout=self._pt_timeout
            )
            output.extra_fields["pivottrace"] = part_of(trace, self._pt_detector)
        return output

    async def pivottrace_trace_counts(self) -> dict[str, int]:
        """`channel.Receiver.counters` of this engine's workers; empty without capture."""
        return {} if self._pt_receiver is None else dict(self._pt_receiver.counters)

    async def pivottrace_watch(self, seconds: float) -> None:
        """Return after so many seconds; raise PivotTraceError at once when the engine is dead."""
        for _ in range(max(1, round(seconds))):
            # Other nodes of a replica have no engine of their own.
            if self.node_rank == 0 and self.engine.errored:
                raise PivotTraceError(
                    f"The vLLM engine of rollout replica {self.replica_rank} died. {LOST}"
                )
            await asyncio.sleep(1.0)


def part_of(trace: Trace | None, detector: DetectorConfig) -> dict[str, Any] | None:
    """Of one request's trace `signal` [T], the feature that the detector follows, and
    `entropy_sum` (nats); None without a trace."""
    if trace is None:
        return None
    return {
        "signal": signal(trace.stats, detector),
        "entropy_sum": float(trace.token_entropy.sum(dtype="float64")),
    }


class PivotReplica(vLLMReplica):
    """verl's vLLM replica, starting our server class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(PivotVLLMServer)
