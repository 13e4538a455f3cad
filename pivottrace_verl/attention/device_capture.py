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

The first prompts that a step computes whole, and the first requests that leave, are checked as
`first_rows` says: there, and only there, the device is waited for. A step that is replayed runs no
Python, so prompts are checked where vLLM computes them outside of full graphs, which its default
does.

The kernels find the batch in the attention metadata, whose tensors vLLM keeps in place for its own
kernels. FlashInfer's metadata has no block table; there the builder's common metadata is kept
beside it.

Not run on a GPU yet. In the tests it runs on vLLM's CPU backend, in Triton's interpreter.
"""

import functools
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
from pivottrace_verl.attention.device_tracker import DeviceTracker, TracedRequest
from pivottrace_verl.attention.first_rows import (
    FIRST,
    LONGEST,
    check_complete,
    check_row,
    dense_row,
)
from pivottrace_verl.attention.kernel import Batch, RowKernel, group_shares, write_tokens
from pivottrace_verl.attention.sender import Sender
from pivottrace_verl.attention.support import TracedLayer, refuse, score_rule, sliding_window
from pivottrace_verl.attention.task import Task
from pivottrace_verl.pivots import FEATURES

_COMMON = "_pivottrace_common"
"""Attribute of an attention metadata without a block table: the common metadata it was made of."""
SPARE_BYTES = 512 << 20
"""Device memory left to others when the store is made, besides what vLLM counted for itself and
takes later: activations, and CUDA graphs, which are captured after this."""


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
        check_memory(runner, task.n_slots * DeviceStore.bytes_per_slot(*shape))
        self.store = DeviceStore(task.n_slots, *shape, device)
        self.rows = StepRows(runner.max_num_reqs, device)
        self.tracker = DeviceTracker(self.store, task.block_size, task.cache_group, self._send)
        self._expecting = False
        self._choices_compiled = False
        self._unchecked = [FIRST] * len(self.layers)
        self._unsent = FIRST
        self._whole: list[tuple[int, TracedRequest]] = []

    def describe(self) -> dict[str, Any]:
        on_gpu = self.runner.device.type == "cuda"
        isa = torch.cuda.get_device_name(self.runner.device) if on_gpu else "interpreter"
        return self.task.describe(isa, self.layouts[0])

    def flush(self) -> None:
        self.tracker.flush()

    def _send(self, key: str, stats: np.ndarray, tokens: np.ndarray, missing_rows: int) -> None:
        if self._unsent > 0:
            self._unsent -= 1
            check_complete(key, len(tokens), missing_rows)
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
        found = _batch_of(metadata)
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

    def check(self, position: int, query: torch.Tensor, key: torch.Tensor, metadata: Any) -> None:
        """Compare the rows of prompts that this step computes whole, which waits for the device.

        Raises RuntimeError where they differ.
        """
        layer = self.layers[position]
        keys = layer_keys(layer, self.layouts[position])
        found = _batch_of(metadata)
        starts = found.query_start_loc.tolist()
        for place, request in self._whole:
            if self._unchecked[position] == 0:
                return
            self._unchecked[position] -= 1
            start, end = starts[place], starts[place + 1]
            if end - start != request.computed:
                raise RuntimeError(
                    f"Attention capture expected the {request.computed} tokens of the first "
                    f"request {request.key!r} at place {place} of the batch, where "
                    f"{end - start} are; {WITHOUT_CAPTURE}."
                )
            last = query[end - 1]
            if query.element_size() == 1:
                last = last.float() * layer.module._q_scale
            expected = dense_row(
                last,
                keys.as_written(key[start:end]),
                request.response_start,
                self._rules[position],
                self._windows[position],
                self.task.config,
            )
            captured = self.store.stats[int(found.slot_mapping[end - 1]), position].cpu()
            shares = self._shares[position].cpu().double()
            check_row(captured, shares @ expected, layer.index, self.task.config.window)

    def choose(self, logits: torch.Tensor) -> None:
        """The step's logits [requests, vocabulary]: the rows are complete."""
        self._expecting = False
        self._whole = []
        if len(logits) != self.rows.n_requests:
            raise RuntimeError(
                f"Attention capture saw logits of {len(logits)} tokens in a step of "
                f"{self.rows.n_requests} requests, so it cannot tell whose they are; "
                f"{WITHOUT_CAPTURE}."
            )
        self._write_tokens(logits)

    def _write_tokens(self, logits: torch.Tensor) -> None:
        write_tokens(logits, self.rows.slots, self.rows.owners, self.store.tokens, self.store.owner)
        self._choices_compiled = True

    def _wrap_forward(self, position: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def traced_forward(layer: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            out = forward(layer, query, *args, **kwargs)
            # Positions as in AttentionImpl.forward: key, value, kv_cache, attn_metadata, ...
            key, metadata = args[0], args[3]
            if metadata is not None:  # there is none when memory is profiled
                self.launch(position, query, metadata)
                if self._whole and self._unchecked[position] and not self._is_capturing():
                    self.check(position, query, key, metadata)
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
            req_ids = order(batch)
            self.rows.fill(*self.tracker.rows_of(req_ids))
            self._expecting = True
            if any(self._unchecked):
                found = self.tracker.whole(req_ids)
                self._whole = [(i, r) for i, r in found if r.computed <= LONGEST]
            return batch

        return traced_prepare_inputs

    def _wrap_dummy(self, dummy_run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(dummy_run)
        def traced_dummy_run(*args: Any, **kwargs: Any) -> Any:
            self.rows.clear()
            self._whole = []
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
            elif not self._choices_compiled and self.rows.are_clear:
                # A warm-up: the kernel is compiled now, and not in the first step.
                self._write_tokens(logits[:1])
            return logits

        return traced_compute_logits

    def _is_capturing(self) -> bool:
        on_gpu = self.runner.device.type == "cuda"
        return bool(on_gpu and torch.cuda.is_current_stream_capturing())

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


def _batch_of(metadata: Any) -> Any:
    """Where the batch is described: the metadata itself, or what it was made of."""
    return metadata if hasattr(metadata, "block_table") else getattr(metadata, _COMMON)


def _keeping(build: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(build)
    def keeping_build(
        common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kw: Any
    ) -> Any:
        metadata = build(common_prefix_len, common_attn_metadata, *args, **kw)
        setattr(metadata, _COMMON, common_attn_metadata)
        return metadata

    return keeping_build


def check_memory(runner: Any, wanted: int) -> None:
    """Refuse a store of `wanted` bytes that does not fit beside what vLLM took and will take."""
    if runner.device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(runner.device)
    cache = runner.cache_config
    to_come = 0
    if cache.kv_cache_memory_bytes is None:
        to_come = max(0, int(total * cache.gpu_memory_utilization) - (total - free))
    lack = wanted + SPARE_BYTES + to_come - free
    if lack > 0:
        refuse(
            f"its store needs {_mib(wanted)} of device memory, and of the {_mib(free)} that are "
            f"free vLLM keeps {_mib(to_come)} for itself and {_mib(SPARE_BYTES)} must be left; "
            f"lower gpu_memory_utilization by {max(0.01, lack / total):.2f}, bound the KV cache, "
            f"with whose tokens the store grows (kv_cache_memory_bytes), or trace fewer layers"
        )


def _mib(n_bytes: int) -> str:
    return f"{n_bytes >> 20} MiB"
