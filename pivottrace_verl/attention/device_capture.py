"""Capture in an engine on a GPU: the kernels are launched by vLLM's own calls, graphs included.

`DeviceCapture` is what `cpu_capture.Capture` is on the CPU, for vLLM's default of full CUDA graphs,
where Python runs when a graph is captured and never again for that batch size. So what a step needs
of Python happens outside of the graph:

- `model_runner.execute_model`: the tracker sees each SchedulerOutput first;
- `model_runner._prepare_inputs` (V1) or `prepare_inputs` (V2): the batch's order is settled, and
  `StepRows` is filled by one copy to the device;
- `impl.forward` of each traced layer, after the original: two kernels, captured with the rest;
- `model.compute_logits`: one kernel for the logits that choose each token; both runners call it
  outside of the graph;
- `model_runner._dummy_run`: dummy batches and warm-ups write no rows.

The kernels find the batch in the attention metadata, whose tensors vLLM keeps in place for its own
kernels. FlashInfer's metadata has no block table; there the builder's common metadata is kept
beside it.

Not run on a GPU yet. In the tests it runs on vLLM's CPU backend, in Triton's interpreter.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from pivottrace_verl.attention.config import WITHOUT_CAPTURE
from pivottrace_verl.attention.device_layers import (
    layer_keys,
    prove_layout,
)
from pivottrace_verl.attention.device_store import DeviceStore, StepRows
from pivottrace_verl.attention.device_tracker import DeviceTracker
from pivottrace_verl.attention.kernel import Batch, RowKernel, group_shares, write_tokens
from pivottrace_verl.attention.sender import Sender
from pivottrace_verl.attention.support import TracedLayer, refuse, score_rule, sliding_window
from pivottrace_verl.attention.task import Task
from pivottrace_verl.pivots import FEATURES

logger = logging.getLogger(__name__)

_COMMON = "_pivottrace_common"
"""Attribute of an attention metadata without a block table: the common metadata it was made of."""
SPARE_BYTES = 512 << 20
"""Device memory left to others when the store is made."""


class DeviceCapture:
    """Capture in one worker, by kernels: its own heads of the traced layers (`parts`).

    A worker that has the logits and no head of any group follows the layer `witness` instead, of
    which nothing is sent.

    Nothing in `launch` and `choose` depends on what the device holds, waits for it or allocates.
    """

    def __init__(self, task: Task, sender: Sender) -> None:
        self.task = task
        self.runner = runner = task.runner
        self._sender = sender
        self._n_sent = len(task.layers)
        self.layers, own = task.layers, task.own_groups
        if not self.layers:
            self.layers, own = [task.followed], [((),) * task.n_groups]
        device, dtype = runner.device, runner.model_config.dtype
        self.layouts = [prove_layout(layer, dtype) for layer in self.layers]
        impls = [layer.module.impl for layer in self.layers]
        self._rules = [score_rule(impl) for impl in impls]
        self._windows = [sliding_window(impl) for impl in impls]
        n_heads = self.layers[0].n_heads
        self._shares = [group_shares(each, n_heads).to(device) for each in own]
        self._kernel = RowKernel(task.config, n_heads, runner.max_num_reqs, device)
        shape = (len(self.layers), task.n_groups, len(FEATURES))
        check_memory(device, task.n_slots * DeviceStore.bytes_per_slot(*shape))
        self.store = DeviceStore(task.n_slots, *shape, device)
        self.rows = StepRows(runner.max_num_reqs, device)
        self.tracker = DeviceTracker(self.store, task.block_size, task.cache_group, self._send)
        self._expecting = False

    def describe(self) -> dict[str, Any]:
        on_gpu = self.runner.device.type == "cuda"
        isa = torch.cuda.get_device_name(self.runner.device) if on_gpu else "interpreter"
        return self.task.describe(isa, self.layouts[0])

    def flush(self) -> None:
        self.tracker.flush()

    def _send(self, key: str, stats: np.ndarray, tokens: np.ndarray, missing_rows: int) -> None:
        self._sender.trace(key, stats[:, : self._n_sent], tokens, missing_rows)

    def wrap(self) -> None:
        """Put the wrappers on this worker's own instances."""
        runner = self.runner
        for position, layer in enumerate(self.layers):
            impl = layer.module.impl
            impl.forward = self._wrap_forward(position, impl.forward)
            if layer.backend == "FLASHINFER":
                self._keep_common_metadata(layer)
        runner.execute_model = self._wrap_execute(runner.execute_model)
        runner._dummy_run = self._wrap_dummy(runner._dummy_run)
        runner.model.compute_logits = self._wrap_logits(runner.model.compute_logits)
        if hasattr(runner, "_prepare_inputs"):
            runner._prepare_inputs = self._wrap_prepare(
                runner._prepare_inputs, lambda _: runner.input_batch.req_ids
            )
        else:
            runner.prepare_inputs = self._wrap_prepare(
                runner.prepare_inputs, lambda batch: batch.req_ids
            )

    def launch(self, position: int, query: torch.Tensor, metadata: Any) -> None:
        """The rows of one traced layer, after its attention: in Python, or while a graph is
        captured that will do it again."""
        layer = self.layers[position]
        found = metadata if hasattr(metadata, "block_table") else getattr(metadata, _COMMON)
        table = found.block_table if found is metadata else found.block_table_tensor
        n_requests = len(found.seq_lens)
        is_last = position == len(self.layers) - 1
        self._kernel(
            query,
            layer_keys(layer, self.layouts[position]),
            self._rules[position],
            Batch(
                starts=found.query_start_loc,
                lengths=found.seq_lens,
                table=table,
                slots=found.slot_mapping,
                prompts=self.rows.prompts[:n_requests],
                responses=self.rows.responses[:n_requests],
            ),
            self._shares[position],
            self.store.stats[:, position],
            self._windows[position],
            query_scale=layer.module._q_scale if query.element_size() == 1 else None,
            written=self.rows.slots if is_last else None,
        )

    def choose(self, logits: torch.Tensor) -> None:
        """The step's logits [requests, vocabulary]: the rows are complete."""
        self._expecting = False
        if len(logits) != self.rows.n_requests:
            raise RuntimeError(
                f"Attention capture saw logits of {len(logits)} tokens in a step of "
                f"{self.rows.n_requests} requests, so it cannot tell whose they are; "
                f"{WITHOUT_CAPTURE}."
            )
        write_tokens(logits, self.rows.slots, self.rows.owners, self.store.tokens, self.store.owner)

    def _wrap_forward(self, position: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def traced_forward(layer: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            out = forward(layer, query, *args, **kwargs)
            # Positions as in AttentionImpl.forward: key, value, kv_cache, attn_metadata, ...
            if args[3] is not None:  # there is none when memory is profiled
                self.launch(position, query, args[3])
            return out

        return traced_forward

    def _wrap_execute(self, execute_model: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(execute_model)
        def traced_execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            # The V2 runner's own dummy runs come this way.
            if not kwargs.get("dummy_run", False):
                if self._expecting:
                    raise RuntimeError(
                        "Attention capture saw a step without logits, so rows would be missing; "
                        f"{WITHOUT_CAPTURE}."
                    )
                self.tracker.observe(scheduler_output)
            return execute_model(scheduler_output, *args, **kwargs)

        return traced_execute_model

    def _wrap_prepare(
        self, prepare: Callable[..., Any], order: Callable[[Any], list[str]]
    ) -> Callable[..., Any]:
        @functools.wraps(prepare)
        def traced_prepare_inputs(*args: Any, **kwargs: Any) -> Any:
            batch = prepare(*args, **kwargs)
            self.rows.fill(*self.tracker.rows_of(order(batch)))
            self._expecting = True
            return batch

        return traced_prepare_inputs

    def _wrap_dummy(self, dummy_run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(dummy_run)
        def traced_dummy_run(*args: Any, **kwargs: Any) -> Any:
            self.rows.clear()
            return dummy_run(*args, **kwargs)

        return traced_dummy_run

    def _wrap_logits(self, compute_logits: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(compute_logits)
        def traced_compute_logits(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            logits = compute_logits(hidden_states, *args, **kwargs)
            # Log-probabilities of a prompt, and warm-ups, come here too, outside of a step or later
            # in it.
            if self._expecting:
                self.choose(logits)
            return logits

        return traced_compute_logits

    def _keep_common_metadata(self, layer: TracedLayer) -> None:
        """Keep the common metadata beside each metadata made for a layer."""
        builders = [
            builder
            for group in self.runner.attn_groups[layer.group]
            if layer.name in group.layer_names
            for builder in group.metadata_builders
        ]
        for builder in builders:
            if "build" not in vars(builder):
                builder.build = _keeping(builder.build)


def _keeping(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def keeping_build(
        common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kw: Any
    ) -> Any:
        metadata = build(common_prefix_len, common_attn_metadata, *args, **kw)
        setattr(metadata, _COMMON, common_attn_metadata)
        return metadata

    return keeping_build


def check_memory(device: torch.device, wanted: int) -> None:
    """Refuse a store that does not fit beside what vLLM took."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    if wanted + SPARE_BYTES > free:
        lack = (wanted + SPARE_BYTES - free) / total
        refuse(
            f"its store needs {wanted >> 20} MiB of device memory and {free >> 20} MiB are free; "
            f"lower gpu_memory_utilization by {max(0.01, lack):.2f} or trace fewer layers"
        )
