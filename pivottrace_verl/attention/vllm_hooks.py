"""What is wrapped inside vLLM, and when.

`install` (from the `vllm.general_plugins` entry point, in every process of vLLM) wraps one class
method, `WorkerWrapperBase.initialize_from_config`. When a worker has its KV cache, and the
environment asks for capture, instance attributes of that worker only are wrapped, by
`device_capture.DeviceCapture` on a GPU, and on a CPU by `Capture`:

- `model_runner.execute_model`: the tracker sees each SchedulerOutput before the runner acts on it;
- `impl.forward` of each traced attention layer: after the original, the rows of the queries that
  choose a token are computed from the paged keys;
- `model.compute_logits`: entropy and self-certainty of the logits that choose each token are
  stored beside them.

In vLLM's V1 runner a request has one such query a step, the last of its scheduled tokens, and with
draft tokens as many more; rows of drafts that are rejected lie where the next step writes. Rows of
other queries are never needed: rows are read out before a preempted request loses its blocks.
Where an engine has several workers each captures its own layers and heads (`parts`); the logits
are read on one. Set-ups that cannot be captured stop the engine at start with a sentence.
"""

import functools
import logging
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pivottrace_verl.attention.config import (
    ENV_CAPTURE,
    ENV_DISABLE,
    ENV_ENDPOINT,
    ENV_TOKEN,
    TOKEN_STATISTICS,
    CaptureConfig,
)
from pivottrace_verl.attention.keys import PagedKeys
from pivottrace_verl.attention.parts import Groups, Part, Place, divide, own_heads
from pivottrace_verl.attention.reference import (
    FLOOR,
    RowPlan,
    ScoreRule,
    group_heads,
    needed_heads,
    plan_rows,
    row_statistics,
)
from pivottrace_verl.attention.sender import Sender
from pivottrace_verl.attention.store import NOBODY, SlotStore, Tracker
from pivottrace_verl.attention.support import (
    TracedLayer,
    check_engine,
    find_layers,
    find_witness,
    key_layout,
    own_place,
)
from pivottrace_verl.pivots import FEATURES

if TYPE_CHECKING:
    from pivottrace_verl.attention.device_capture import DeviceCapture

logger = logging.getLogger(__name__)

_MARK = "_pivottrace"
_NO_BATCH: tuple[list[str], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = (
    [],
    (torch.empty(0), torch.empty(0), torch.empty(0)),
)
_LOGITS_CHUNK = 1 << 20
"""Logits read at once: few enough that what is made of them stays in the cache."""
_captures: "weakref.WeakSet[Capture | DeviceCapture]" = weakref.WeakSet()


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
        capture.flush()


def uses_kernel(runner: Any) -> bool:
    """True where the statistics come from the Triton kernel and not from torch."""
    return bool(runner.device.type != "cpu")


def _asked_for() -> bool:
    return bool(os.environ.get(ENV_CAPTURE)) and os.environ.get(ENV_DISABLE) != "1"


def attach(wrapper: Any, kv_cache_config: Any) -> "Capture | DeviceCapture | None":
    """Start capturing in a worker whose KV cache was just made, before CUDA graphs are captured;
    None if this worker has neither a traced layer nor the logits.

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
    on_device, problem = uses_kernel(runner), None
    if on_device:
        # Imports Triton, which engines on a CPU do without.
        from pivottrace_verl.attention import device_capture, device_layers

        device_layers.check_device_engine(wrapper.vllm_config, runner)
        problem = device_layers.device_problem(kv_cache_config, config)
    else:
        check_engine(wrapper.vllm_config, runner)
    place = own_place()
    layers = find_layers(wrapper.vllm_config, kv_cache_config, config, place, problem=problem)
    groups = [
        config.choose_heads(layer.n_heads * place.tensor_size, position)
        for position, layer in enumerate(layers)
    ]
    parts = divide([layer.stage for layer in layers], groups, layers[0].n_heads, place)
    part = parts[place.stage * place.tensor_size + place.tensor_rank]
    if part is None:
        return None
    witness = None
    if not part.layers:
        witness = find_witness(wrapper.vllm_config, kv_cache_config, layers[0])
    # One worker that captures everything sends traces and not parts.
    sender = Sender(
        os.environ[ENV_ENDPOINT], os.environ[ENV_TOKEN], config.wire, part if part.of > 1 else None
    )
    settings = (runner, kv_cache_config, layers, groups, config, sender, place, part, witness)
    capture = device_capture.DeviceCapture(*settings) if on_device else Capture(*settings)
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
    """[N] which of the step's logits have a row; None for all."""
    tokens: torch.Tensor | None
    """[N] which of the batch's tokens are the rows; None for all."""
    plan: RowPlan | None
    """None where no layer is traced."""
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
        groups: list[Groups],
        config: CaptureConfig,
        sender: Sender,
        place: Place,
        part: Part,
        witness: TracedLayer | None,
    ) -> None:
        self.runner = runner
        self.place = place
        self.traced = layers
        self.layers = [layers[number] for number in part.layers]
        self.layouts = [key_layout(layer) for layer in self.layers]
        self.config = config
        self._witness = witness
        self._has_logits = part.tokens
        self.groups = groups
        self._heads = [
            needed_heads(own_heads(groups[number], layer.n_heads, place.tensor_rank), layer.n_heads)
            for number, layer in zip(part.layers, self.layers, strict=True)
        ]
        impls = [layer.module.impl for layer in self.layers]
        self._rules = [ScoreRule(impl.scale, impl.logits_soft_cap) for impl in impls]
        block_size = kv_cache_config.kv_cache_groups[layers[0].group].kv_cache_spec.block_size
        self._block_size = block_size
        self.store = SlotStore(
            kv_cache_config.num_blocks * block_size,
            len(self.layers),
            len(self.groups[0]),
            len(FEATURES),
        )
        self.tracker = Tracker(
            self.store,
            block_size,
            layers[0].group,
            sender.trace,
            scheduled_rows=not place.is_last_stage,
        )
        self._drafts: dict[str, list[int]] = {}
        self._expecting = False
        self._step: Step | None = None
        self._batch = _NO_BATCH

    def describe(self) -> dict[str, Any]:
        first, chosen = self.layers[0] if self.layers else self._witness, self.config.heads
        assert first is not None
        return {
            "backend": first.backend,
            "isa": first.isa,
            "key_layout": self.layouts[0] if self.layouts else None,
            "layers": [layer.index for layer in self.traced],
            "head_groups": None if chosen else [list(group) for group in self.groups[0]],
            "heads": chosen and [list(heads) for heads in chosen],
            "features": list(FEATURES),
            "dtype": str(first.module.kv_cache.dtype).removeprefix("torch."),
            "block_size": self._block_size,
            "slots": len(self.store.owner),
            "tensor_parallel": self.place.tensor_size,
            "pipeline_parallel": self.place.n_stages,
        }

    def flush(self) -> None:
        self.tracker.flush(self.runner.requests)

    def wrap(self) -> None:
        """Put the wrappers on this worker's own instances."""
        for position, layer in enumerate(self.layers):
            layer.module.impl.forward = self._wrap_forward(position, layer.module.impl.forward)
        if self._witness is not None:
            impl = self._witness.module.impl
            impl.forward = self._wrap_forward(None, impl.forward)
        execute_model, model = self.runner.execute_model, self.runner.model

        @functools.wraps(execute_model)
        def traced_execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            self.observe(scheduler_output)
            return execute_model(scheduler_output, *args, **kwargs)

        self.runner.execute_model = traced_execute_model
        if not self._has_logits:
            return
        compute_logits = model.compute_logits

        @functools.wraps(compute_logits)
        def traced_compute_logits(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            logits = compute_logits(hidden_states, *args, **kwargs)
            if self._expecting:
                self.finish(logits)
            return logits

        model.compute_logits = traced_compute_logits

    def _wrap_forward(
        self, position: int | None, forward: Callable[..., Any]
    ) -> Callable[..., Any]:
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
        self._drafts = scheduler_output.scheduled_spec_decode_tokens
        self._expecting = bool(self.tracker.requests) and (
            scheduler_output.total_num_scheduled_tokens > 0
        )
        if scheduler_output.finished_req_ids or scheduler_output.scheduled_new_reqs:
            self._batch = _NO_BATCH

    def record(
        self, position: int | None, query: torch.Tensor, kv_cache: torch.Tensor, metadata: Any
    ) -> None:
        """Rows of one traced layer, after its attention ran; no position: of the witness, which
        has none."""
        if self._step is None:
            self._step = self._begin(metadata)
            if self._step is None:
                self._expecting = False
                return
        step = self._step
        if position is None or step.plan is None:
            return
        heads, groups = self._heads[position]
        query = query[: metadata.num_actual_tokens]
        if step.tokens is not None:
            query = query.index_select(0, step.tokens)
        keys = PagedKeys(kv_cache, self.layouts[position])
        rows = row_statistics(query, keys, step.plan, self._rules[position], heads)
        one = len(groups) == 1 and len(groups[0]) == rows.shape[1]
        rows = rows.mean(1, keepdim=True) if one else group_heads(rows, groups)
        self.store.write_layer(position, step.slots, rows)
        step.layers_done += 1
        if not self._has_logits and step.layers_done == len(self.layers):
            self._step, self._expecting = None, False
            unknown = torch.zeros(len(step.slots), len(TOKEN_STATISTICS))
            self.store.finish_rows(step.slots, unknown, step.owners)

    def finish(self, logits: torch.Tensor) -> None:
        """The step's logits [queries that choose a token, vocabulary]: the rows are complete."""
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
        table = metadata.block_table[: len(owners)]
        if self._drafts:
            request, back = self._drafted()
            tokens, positions = tokens[request] - back, positions[request] - back
            prompts, starts = prompts[request], starts[request]
            owners, table = owners[request], table[request]
        wanted = (owners != NOBODY) & (positions >= prompts - 1)
        batch = None
        if not bool(wanted.all()):
            batch = wanted.nonzero().squeeze(1)
            if len(batch) == 0:
                return None
            tokens, positions, starts = tokens[batch], positions[batch], starts[batch]
            table, owners = table[batch], owners[batch]
        plan = None
        if self.layers:
            kernel_block = self.layers[0].module.kv_cache.shape[2]
            plan = plan_rows(table, positions, starts, kernel_block, self.config)
        return Step(
            batch=batch,
            tokens=tokens if batch is not None or metadata.max_query_len > 1 else None,
            plan=plan,
            slots=metadata.slot_mapping[tokens].to(torch.long),
            owners=owners,
        )

    def _drafted(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each query that chooses a token in a step with drafts: its request in batch order, and
        how many queries of that request come after it. Ascending, as vLLM's logits are."""
        drafts = [len(self._drafts.get(id_, ())) for id_ in self.runner.input_batch.req_ids]
        back = [n - i for n in drafts for i in range(n + 1)]
        request = [number for number, n in enumerate(drafts) for _ in range(n + 1)]
        return torch.tensor(request), torch.tensor(back)

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
