"""Capture in one worker of an engine on a CPU: rows in compiled code or torch, step by step.

`Capture` wraps instance attributes of that worker only:

- `model_runner.execute_model`: the tracker sees each SchedulerOutput before the runner acts on it;
- `impl.forward` of each traced attention layer: after the original, the rows of the queries that
  choose a token are computed from the paged keys;
- `model.compute_logits`: entropy and self-certainty of the logits that choose each token are
  stored beside them.

In vLLM's V1 runner a request has one such query a step, the last of its scheduled tokens, and with
draft tokens as many more; rows of drafts that are rejected lie where the next step writes. Rows of
other queries are never needed: rows are read out before a preempted request loses its blocks.
Where an engine has several workers each captures its own layers and heads (`parts`); the logits
are read on one.

Axes: N rows of a step, H query heads, H_kv key heads, D head size, F features.
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pivottrace_verl.attention.config import TOKEN_STATISTICS, WITHOUT_CAPTURE
from pivottrace_verl.attention.cpu_rows import LayerRows, StepRows, compiled_rows
from pivottrace_verl.attention.first_rows import (
    FIRST,
    LONGEST,
    check_complete,
    check_row,
    dense_row,
)
from pivottrace_verl.attention.keys import PagedKeys
from pivottrace_verl.attention.reference import (
    group_heads,
    needed_heads,
    row_statistics,
    token_statistics,
)
from pivottrace_verl.attention.sender import Sender
from pivottrace_verl.attention.store import NOBODY, SlotStore, Tracker
from pivottrace_verl.attention.support import key_layout, score_rule, sliding_window
from pivottrace_verl.attention.task import Task
from pivottrace_verl.pivots import FEATURES

NEVER = np.iinfo(np.int64).max
_NO_BATCH: tuple[list[str], tuple[list[int], np.ndarray, np.ndarray]] = (
    [],
    ([], np.empty(0), np.empty(0)),
)


@dataclass
class Step:
    """What the traced layers of one forward pass share; N rows, one a request."""

    batch: torch.Tensor | None
    """[N] which of the step's logits have a row; None for all."""
    tokens: torch.Tensor | None
    """[N] which of the batch's tokens are the rows; None for all."""
    rows: StepRows
    slots: torch.Tensor
    owners: np.ndarray
    layers_done: int = 0


class Capture:
    """Capture in one worker: `observe` a step, `record` each traced layer, `finish` with logits."""

    def __init__(self, task: Task, sender: Sender) -> None:
        self.task = task
        self.runner = task.runner
        self.layers = task.layers
        self._sender = sender
        self._layouts = [key_layout(layer) for layer in self.layers]
        impls = [layer.module.impl for layer in self.layers]
        self._rules = [score_rule(impl) for impl in impls]
        self._windows = [sliding_window(impl) for impl in impls]
        self._heads = [
            needed_heads(own, layer.n_heads)
            for own, layer in zip(task.own_groups, self.layers, strict=True)
        ]
        self._compiled = compiled_rows(
            [layer.module.kv_cache for layer in self.layers],
            [
                LayerRows(layout, rule, window, own, layer.n_heads)
                for layout, rule, window, own, layer in zip(
                    self._layouts,
                    self._rules,
                    self._windows,
                    task.own_groups,
                    self.layers,
                    strict=True,
                )
            ],
            task.config,
        )
        self.store = SlotStore(task.n_slots, len(self.layers), task.n_groups, len(FEATURES))
        self.tracker = Tracker(
            self.store,
            task.block_size,
            task.cache_group,
            self._send,
            scheduled_rows=not task.place.is_last_stage,
        )
        # vLLM may split the scheduler's blocks into smaller ones.
        self._kernel_block = task.followed.module.kv_cache.shape[2]
        self._unchecked = [FIRST] * len(self.layers)
        self._unsent = FIRST
        self._drafts: dict[str, list[int]] = {}
        self._expecting = False
        self._step: Step | None = None
        self._batch = _NO_BATCH

    def describe(self) -> dict[str, Any]:
        layout = self._layouts[0] if self._layouts else None
        return self.task.describe(self.task.followed.isa, layout)

    def flush(self) -> None:
        """Send the traces of all requests that are tracked."""
        self.tracker.flush(self.runner.requests)

    def wrap(self) -> None:
        """Put the wrappers on this worker's own instances."""
        for position, layer in enumerate(self.layers):
            layer.module.impl.forward = self._wrap_forward(position, layer.module.impl.forward)
        if self.task.witness is not None:
            impl = self.task.witness.module.impl
            impl.forward = self._wrap_forward(None, impl.forward)
        execute_model, model = self.runner.execute_model, self.runner.model

        @functools.wraps(execute_model)
        def traced_execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            self.observe(scheduler_output)
            return execute_model(scheduler_output, *args, **kwargs)

        self.runner.execute_model = traced_execute_model
        if not self.task.part.tokens:
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
                step = self.record(position, query, kv_cache, metadata)
                if position is not None and step is not None and self._unchecked[position] > 0:
                    self._check(position, step, query, args[0], metadata)
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
    ) -> Step | None:
        """Rows of one traced layer, after its attention ran; no position: of the witness, which
        has none. Returns their step, None where there are none."""
        if self._step is None:
            self._step = self._begin(metadata)
            if self._step is None:
                self._expecting = False
        step = self._step
        if step is None or position is None:
            return None
        query = query[: metadata.num_actual_tokens]
        if step.tokens is not None:
            query = query.index_select(0, step.tokens)
        if self._compiled is not None:
            self._compiled.write_rows(
                position, query, kv_cache, step.rows, self.store.stats, step.slots
            )
        else:
            heads, groups = self._heads[position]
            keys = PagedKeys(kv_cache, self._layouts[position])
            plan = step.rows.plan(self._windows[position])
            rows = row_statistics(query, keys, plan, self._rules[position], heads)
            self.store.write_layer(position, step.slots, group_heads(rows, groups))
        step.layers_done += 1
        if not self.task.part.tokens and step.layers_done == len(self.layers):
            self._step, self._expecting = None, False
            self.store.write_tokens(step.slots, torch.zeros(len(step.slots), len(TOKEN_STATISTICS)))
            self.store.own(step.slots, step.owners)
        return step

    def _send(self, key: str, stats: np.ndarray, tokens: np.ndarray, missing_rows: int) -> None:
        if self._unsent > 0:
            self._unsent -= 1
            check_complete(key, len(tokens), missing_rows)
        self._sender.trace(key, stats, tokens, missing_rows)

    def _check(
        self, position: int, step: Step, query: torch.Tensor, key: torch.Tensor, metadata: Any
    ) -> None:
        """Compare rows of the first prompts that are computed in one step; raises RuntimeError."""
        if metadata.max_query_len == 1 or self._drafts:
            return
        (heads, groups), starts = self._heads[position], metadata.query_start_loc
        # Of a group that is wholly on other ranks there is nothing here.
        there = [number for number, group in enumerate(groups) if group]
        requests = range(len(step.slots)) if step.batch is None else step.batch.tolist()
        for row, request in enumerate(requests):
            start, end = int(starts[request]), int(starts[request + 1])
            whole = end - start == int(metadata.seq_lens[request]) <= LONGEST
            if not whole or self._unchecked[position] == 0:
                continue
            self._unchecked[position] -= 1
            expected = dense_row(
                query[end - 1],
                key[start:end],
                int(step.rows.starts[row]),
                self._rules[position],
                self._windows[position],
                self.task.config,
            )
            expected = group_heads((expected if heads is None else expected[heads])[None], groups)
            captured = self.store.stats[step.slots[row], position]
            check_row(
                captured[there],
                expected[0, there],
                self.layers[position].index,
                self.task.config.window,
            )

    def finish(self, logits: torch.Tensor) -> None:
        """The step's logits [queries that choose a token, vocabulary]: the rows are complete."""
        step, self._step, self._expecting = self._step, None, False
        if step is None or step.layers_done != len(self.layers):
            done = 0 if step is None else step.layers_done
            raise RuntimeError(
                f"Attention capture saw {done} of its {len(self.layers)} layers run in a step "
                f"that chooses tokens, so rows would be missing; {WITHOUT_CAPTURE}."
            )
        if self._compiled is not None:
            self._compiled.write_tokens(logits, step.batch, self.store.tokens, step.slots)
        else:
            tokens = token_statistics(logits if step.batch is None else logits[step.batch])
            self.store.write_tokens(step.slots, tokens)
        self.store.own(step.slots, step.owners)

    def _begin(self, metadata: Any) -> Step | None:
        """Which queries of this step are rows; None when there are none."""
        firsts, starts, owners = self._batch_rows()
        n = len(owners)
        # Lists: where a step's weights have filled the processor's caches, any operation of torch
        # or numpy takes some 10 us, and Python's own code is there already.
        positions = [length - 1 for length in metadata.seq_lens.tolist()[:n]]
        table = metadata.block_table.numpy()[:n]
        tokens: list[int] | None = None  # one query a request, in the batch's order
        if metadata.max_query_len > 1 or self._drafts:
            tokens = [end - 1 for end in metadata.query_start_loc.tolist()[1 : n + 1]]
            if self._drafts:
                request, back = self._drafted()
                tokens = [tokens[i] - before for i, before in zip(request, back, strict=True)]
                positions = [positions[i] - before for i, before in zip(request, back, strict=True)]
                firsts = [firsts[i] for i in request]
                starts, owners, table = starts[request], owners[request], table[request]
        batch = None
        if any(map(operator.lt, positions, firsts)):
            wanted = map(operator.ge, positions, firsts)
            batch = [number for number, asked in enumerate(wanted) if asked]
            if not batch:
                return None
            tokens = batch if tokens is None else [tokens[i] for i in batch]
            positions = [positions[i] for i in batch]
            starts, owners, table = starts[batch], owners[batch], table[batch]
        queries = None if tokens is None else torch.tensor(tokens)
        return Step(
            batch=None if batch is None else torch.tensor(batch),
            tokens=queries,
            rows=StepRows(table, positions, starts, self._kernel_block, self.task.config),
            slots=metadata.slot_mapping[slice(n) if queries is None else queries].to(torch.long),
            owners=owners,
        )

    def _drafted(self) -> tuple[list[int], list[int]]:
        """Of each query that chooses a token in a step with drafts: its request in batch order, and
        how many queries of that request come after it. Ascending, as vLLM's logits are."""
        drafts = [len(self._drafts.get(id_, ())) for id_ in self.runner.input_batch.req_ids]
        back = [n - i for n in drafts for i in range(n + 1)]
        request = [number for number, n in enumerate(drafts) for _ in range(n + 1)]
        return request, back

    def _batch_rows(self) -> tuple[list[int], np.ndarray, np.ndarray]:
        """(positions that choose a first token, response starts, owners) in batch order, the first
        out of reach where a request did not ask; kept while the batch stays the same."""
        req_ids = self.runner.input_batch.req_ids
        if req_ids != self._batch[0]:
            prompts, starts, owners = self.tracker.rows_of(req_ids)
            firsts = np.where(owners == NOBODY, NEVER, prompts - 1).tolist()
            self._batch = (list(req_ids), (firsts, starts, owners))
        return self._batch[1]
