"""What is wrapped inside vLLM, and when.

`install` (from the `vllm.general_plugins` entry point, in every process of vLLM) wraps one class
method, `WorkerWrapperBase.initialize_from_config`. When a worker has its KV cache, and the
environment asks for capture, `Capture` wraps instance attributes of that worker only:

- `model_runner.execute_model`: the tracker sees each SchedulerOutput before the runner acts on it;
- `impl.forward` of each traced attention layer: after the original, the rows of the queries that
  choose a token are computed from the paged keys;
- `model.compute_logits`: entropy and self-certainty of the logits that choose each token are
  stored beside them.

In vLLM's V1 runner a request has one such query a step, the last of its scheduled tokens. Rows of
other queries are never needed: rows are read out before a preempted request loses its blocks.
Set-ups that cannot be captured stop the engine at start with a sentence.
"""

import functools
import logging
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pivottrace_verl.attention.channel import Sender
from pivottrace_verl.attention.config import (
    ENV_CAPTURE,
    ENV_DISABLE,
    ENV_ENDPOINT,
    ENV_TOKEN,
    CaptureConfig,
)
from pivottrace_verl.attention.keys import PagedKeys
from pivottrace_verl.attention.reference import (
    FLOOR,
    RowPlan,
    ScoreRule,
    group_heads,
    needed_heads,
    plan_rows,
    row_statistics,
)
from pivottrace_verl.attention.store import NOBODY, SlotStore, Tracker
from pivottrace_verl.attention.support import (
    TracedLayer,
    check_engine,
    find_layers,
    key_layout,
)
from pivottrace_verl.pivots import FEATURES

logger = logging.getLogger(__name__)

_MARK = "_pivottrace"
_NO_BATCH: tuple[list[str], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = (
    [],
    (torch.empty(0), torch.empty(0), torch.empty(0)),
)
_LOGITS_CHUNK = 1 << 20
"""Logits read at once: few enough that what is made of them stays in the cache."""
_captures: "weakref.WeakSet[Capture]" = weakref.WeakSet()


def install() -> None:
    """Wrap the worker class once per process; does nothing unless capture is asked for."""
    if not _asked_for():
        return
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    original = WorkerWrapperBase.initialize_from_config
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def initialize_from_config(self: Any, kv_cache_configs: list[Any]) -> None:
        original(self, kv_cache_configs)
        if _asked_for():
            attach(self, kv_cache_configs[self.global_rank])

    setattr(initialize_from_config, _MARK, True)
    WorkerWrapperBase.initialize_from_config = initialize_from_config


def flush() -> None:
    """Send the traces of this process's engines whose requests have finished.

    Only an in-process engine (VLLM_ENABLE_V1_MULTIPROCESSING=0) needs it: it never tells its
    worker about the last requests that finished. Call it when `generate` has returned.
    """
    for capture in list(_captures):
        capture.tracker.flush(capture.runner.requests)


def _asked_for() -> bool:
    return bool(os.environ.get(ENV_CAPTURE)) and os.environ.get(ENV_DISABLE) != "1"


def attach(wrapper: Any, kv_cache_config: Any) -> "Capture":
    """Start capturing in a worker whose KV cache was just made.

    Raises RuntimeError, which stops the engine, where capture was asked for and cannot be had.
    """
    for name in (ENV_ENDPOINT, ENV_TOKEN):
        if not os.environ.get(name):
            raise RuntimeError(
                f"{ENV_CAPTURE} is set and {name} is not: attention capture needs a receiver, "
                f"started before the engine (pivottrace_verl.attention.channel.Receiver)."
            )
    config = CaptureConfig.from_json(os.environ[ENV_CAPTURE])
    runner = wrapper.worker.model_runner
    check_engine(wrapper.vllm_config, runner)
    layers = find_layers(wrapper.vllm_config, kv_cache_config, config)
    sender = Sender(os.environ[ENV_ENDPOINT], os.environ[ENV_TOKEN], config.wire)
    capture = Capture(runner, kv_cache_config, layers, config, sender)
    capture.wrap()
    _captures.add(capture)
    info = capture.describe()
    logger.info("PivotTrace captures attention: %s", info)
    sender.hello(info)
    return capture


@dataclass
class Step:
    """What the traced layers of one forward pass share; N rows, one a request."""

    batch: torch.Tensor | None
    """[N] which of the batch's requests have a row; None for all."""
    tokens: torch.Tensor | None
    """[N] which of the batch's tokens are the rows; None for all."""
    plan: RowPlan
    slots: torch.Tensor
    owners: torch.Tensor
    layers_done: int = 0


class Capture:
    """Capture in one worker: `observe` a step, `record` each traced layer, `finish` with logits."""

    def __init__(
        self,
        runner: Any,
        kv_cache_config: Any,
        layers: list[TracedLayer],
        config: CaptureConfig,
        sender: Sender,
    ) -> None:
        self.runner = runner
        self.layers = layers
        self.layouts = [key_layout(layer) for layer in layers]
        self.config = config
        self.groups = [
            config.choose_heads(layer.n_heads, position) for position, layer in enumerate(layers)
        ]
        self._heads = [
            needed_heads(groups, layer.n_heads)
            for groups, layer in zip(self.groups, layers, strict=True)
        ]
        impls = [layer.module.impl for layer in layers]
        self._rules = [ScoreRule(impl.scale, impl.logits_soft_cap) for impl in impls]
        block_size = kv_cache_config.kv_cache_groups[layers[0].group].kv_cache_spec.block_size
        self._block_size = block_size
        self.store = SlotStore(
            kv_cache_config.num_blocks * block_size,
            len(layers),
            len(self.groups[0]),
            len(FEATURES),
        )
        self.tracker = Tracker(self.store, block_size, layers[0].group, sender.trace)
        self._expecting = False
        self._step: Step | None = None
        self._batch = _NO_BATCH

    def describe(self) -> dict[str, Any]:
        first, chosen = self.layers[0], self.config.heads
        return {
            "backend": first.backend,
            "isa": first.isa,
            "key_layout": self.layouts[0],
            "layers": [layer.index for layer in self.layers],
            "head_groups": None if chosen else [list(group) for group in self.groups[0]],
            "heads": chosen and [list(heads) for heads in chosen],
            "features": list(FEATURES),
            "dtype": str(first.module.kv_cache.dtype).removeprefix("torch."),
            "block_size": self._block_size,
            "slots": len(self.store.owner),
        }

    def wrap(self) -> None:
        """Put the wrappers on this worker's own instances."""
        for position, layer in enumerate(self.layers):
            layer.module.impl.forward = self._wrap_forward(position, layer.module.impl.forward)
        execute_model, model = self.runner.execute_model, self.runner.model
        compute_logits = model.compute_logits

        @functools.wraps(execute_model)
        def traced_execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            self.observe(scheduler_output)
            return execute_model(scheduler_output, *args, **kwargs)

        @functools.wraps(compute_logits)
        def traced_compute_logits(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            logits = compute_logits(hidden_states, *args, **kwargs)
            if self._expecting:
                self.finish(logits)
            return logits

        self.runner.execute_model = traced_execute_model
        model.compute_logits = traced_compute_logits

    def _wrap_forward(self, position: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def traced_forward(layer: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            out = forward(layer, query, *args, **kwargs)
            # Positions as in AttentionImpl.forward: key, value, kv_cache, attn_metadata, ...
            kv_cache, metadata = args[2], args[3]
            # Profiling and warm-up runs have no metadata, or come outside a step.
            if self._expecting and metadata is not None:
                self.record(position, query, kv_cache, metadata)
            return out

        return traced_forward

    def observe(self, scheduler_output: Any) -> None:
        """Top of a step, before the runner's own bookkeeping."""
        self.tracker.observe(scheduler_output, self.runner.requests)
        self._step = None
        self._expecting = bool(self.tracker.requests) and (
            scheduler_output.total_num_scheduled_tokens > 0
        )
        if scheduler_output.finished_req_ids or scheduler_output.scheduled_new_reqs:
            self._batch = _NO_BATCH

    def record(
        self, position: int, query: torch.Tensor, kv_cache: torch.Tensor, metadata: Any
    ) -> None:
        """Rows of one traced layer, after its attention ran."""
        if self._step is None:
            self._step = self._begin(metadata)
            if self._step is None:
                self._expecting = False
                return
        step, (heads, groups) = self._step, self._heads[position]
        query = query[: metadata.num_actual_tokens]
        if step.tokens is not None:
            query = query.index_select(0, step.tokens)
        keys = PagedKeys(kv_cache, self.layouts[position])
        rows = row_statistics(query, keys, step.plan, self._rules[position], heads)
        one = len(groups) == 1 and len(groups[0]) == rows.shape[1]
        rows = rows.mean(1, keepdim=True) if one else group_heads(rows, groups)
        self.store.write_layer(position, step.slots, rows)
        step.layers_done += 1

    def finish(self, logits: torch.Tensor) -> None:
        """The step's logits [requests, vocabulary]: the rows are complete."""
        step, self._step, self._expecting = self._step, None, False
        if step is None or step.layers_done != len(self.layers):
            done = 0 if step is None else step.layers_done
            raise RuntimeError(
                f"Attention capture saw {done} of its {len(self.layers)} layers run in a step "
                f"that chooses tokens, so rows would be missing; set PIVOTTRACE_DISABLE=1 to run "
                f"without capture."
            )
        if step.batch is not None:
            logits = logits.index_select(0, step.batch)
        self.store.finish_rows(step.slots, token_statistics(logits), step.owners)

    def _begin(self, metadata: Any) -> Step | None:
        """Which queries of this step are rows; None when there are none."""
        prompts, starts, owners = self._batch_rows()
        ends = metadata.query_start_loc[1 : len(owners) + 1]
        tokens = ends.to(torch.long) - 1
        positions = metadata.seq_lens[: len(owners)].to(torch.long) - 1
        wanted = (owners != NOBODY) & (positions >= prompts - 1)
        table = metadata.block_table[: len(owners)]
        batch = None
        if not bool(wanted.all()):
            batch = wanted.nonzero().squeeze(1)
            if len(batch) == 0:
                return None
            tokens, positions, starts = tokens[batch], positions[batch], starts[batch]
            table, owners = table[batch], owners[batch]
        kernel_block = self.layers[0].module.kv_cache.shape[2]
        return Step(
            batch=batch,
            tokens=tokens if batch is not None or metadata.max_query_len > 1 else None,
            plan=plan_rows(table, positions, starts, kernel_block, self.config),
            slots=metadata.slot_mapping[tokens].to(torch.long),
            owners=owners,
        )

    def _batch_rows(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(prompt lengths, response starts, owners) in batch order; kept while the batch stays the
        same."""
        req_ids = self.runner.input_batch.req_ids
        if req_ids != self._batch[0]:
            prompts, starts, owners = map(torch.from_numpy, self.tracker.rows_of(req_ids))
            self._batch = (list(req_ids), (prompts, starts, owners))
        return self._batch[1]


def token_statistics(logits: torch.Tensor) -> torch.Tensor:
    """Statistics in nats of p = softmax(logits) at temperature 1, over the full vocabulary:
    [N, V] -> [N, K] float32, in the order of `TOKEN_STATISTICS`.

    Entropy is -sum p log p. Self-certainty (arXiv 2502.18581) is KL(uniform || p)
    = -1/V sum log(V p), taken over the words that are not masked.
    """
    chunk = max(1, _LOGITS_CHUNK // logits.shape[-1])
    out = []
    for part in logits.split(chunk):
        # Masked vocabulary is -inf; the floor keeps 0 * -inf out of the sum.
        top = part.amax(-1, keepdim=True).float()
        score = part.float() - top
        n_words = score.new_full((len(score),), score.shape[-1])
        score_sum = score.sum(-1)
        if bool(score_sum.isinf().any()):
            masked = score == -torch.inf
            n_words -= masked.sum(-1)
            score_sum = score.masked_fill(masked, 0.0).sum(-1)
        score.clamp_min_(FLOOR)
        weight = score.exp()
        total = weight.sum(-1)
        log_total = total.log()
        entropy = log_total - torch.linalg.vecdot(weight, score) / total
        certainty = log_total - n_words.log() - score_sum / n_words
        out.append(torch.stack([entropy, certainty], dim=-1))
    return torch.cat(out)
