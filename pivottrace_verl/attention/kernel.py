"""The row statistics as a fused Triton kernel: the mathematics of `reference`, in one pass.

`RowKernel` launches the two kernels of `kernel_code` for each traced layer: one walks the paged
keys, one forms the features and writes them into the store at the row's KV slot. `write_tokens`
launches `kernel_tokens` for the logits that choose each row's token.

Contract: launches read sizes from shapes only, grids depend on the padded batch only, scratch is
made once, nothing waits for the device; so a launch can be captured into a CUDA graph and replayed
on new contents of the same tensors. Rows that are padding, not asked for, or choose no token are
left alone.

A context is walked in 8 parts whatever the batch, so that the grid stays the same: one sequence of
32k tokens fills 8 programs a KV head, which leaves most of a large GPU idle.

Importing this module needs Triton; only `device_capture`, of engines on a GPU, imports it. Nothing
here was run on a GPU yet: the tests run it in Triton's interpreter (TRITON_INTERPRET=1, set before
Triton is first imported) and compile it for CUDA.

Axes: R requests of a padded batch, B blocks of a request, N = R * rows_per_request rows, H query
heads, G head groups, D head size, F features in the order of `pivots.FEATURES`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.attention.kernel_code import COLUMNS, merge, walk
from pivottrace_verl.attention.kernel_tokens import choices
from pivottrace_verl.attention.keys import StridedKeys
from pivottrace_verl.attention.reference import ScoreRule
from pivottrace_verl.pivots import FEATURES


@dataclass(frozen=True)
class Batch:
    """The device tensors of a step that rows are found by; integers, contiguous, padded as the
    runner pads them: a padding request has length 0 or no tokens, a padding token slot -1."""

    starts: torch.Tensor
    """[R + 1] first token of each request."""
    lengths: torch.Tensor
    """[R] tokens of each request so far, those of this step included."""
    table: torch.Tensor
    """[R, B] block numbers."""
    slots: torch.Tensor
    """[tokens] KV slot of each token."""
    prompts: torch.Tensor
    """[R] prompt length P of each request, -1 for one that did not ask: its rows begin at P - 1."""
    responses: torch.Tensor
    """[R] position where each request's response begins: P, or less where the prompt holds the
    beginning of a response."""


def group_shares(groups: Sequence[Sequence[int]], n_heads: int) -> torch.Tensor:
    """[G, H]: what each head's features count for in the mean of each group
    (`CaptureConfig.choose_heads`); a group without heads here gets zeros."""
    shares = torch.zeros(len(groups), n_heads)
    for share, group in zip(shares, groups, strict=True):
        share[list(group)] = 1 / max(1, len(group))
    return shares


class RowKernel:
    """The kernels of one engine, with their scratch.

    Args:
        max_requests: R of the largest padded batch.
        rows_per_request: tokens a request may choose in a step: 1, plus the drafted ones.
        splits: parts of a context that are walked at once.
        tile: keys a program reads at once, a power of two of 16 at least.
    """

    def __init__(
        self,
        config: CaptureConfig,
        n_heads: int,
        max_requests: int,
        device: torch.device | str,
        *,
        rows_per_request: int = 1,
        splits: int = 8,
        tile: int = 64,
    ) -> None:
        self._window, self._sink = config.window, config.sink
        self._n_heads = n_heads
        self._rows, self._splits, self._tile = rows_per_request, splits, tile
        n_rows = max_requests * rows_per_request
        self._state = torch.empty(n_rows, splits, n_heads, COLUMNS.value, device=device)

    def __call__(
        self,
        query: torch.Tensor,
        keys: StridedKeys,
        rule: ScoreRule,
        batch: Batch,
        shares: torch.Tensor,
        out: torch.Tensor,
        sliding_window: int | None = None,
        query_scale: torch.Tensor | None = None,
        written: torch.Tensor | None = None,
    ) -> None:
        """Write the rows of one layer into `out` [slots, G, F], at their slots.

        Args:
            query: [tokens, H, D] after rotary embedding.
            keys: the layer's, those of this step included.
            shares: [G, H] `group_shares` of the layer, on the device; keys of KV heads without a
                share are not read.
            sliding_window: keys a row sees, its own included; None: all up to its position.
            query_scale: [1] float32, what FP8 queries are multiplied by.
            written: [N] int32; where a row is written, its place gets the row's slot.
        Raises ValueError where the shapes do not fit what this kernel was made for.
        """
        n_requests, kv_heads, size = len(batch.lengths), keys.kv_heads, query.shape[2]
        n_rows = n_requests * self._rows
        if n_rows > len(self._state) or query.shape[1] != self._n_heads:
            raise ValueError(
                f"{n_rows} rows of {query.shape[1]} heads do not fit a kernel made for "
                f"{len(self._state)} rows of {self._n_heads} heads."
            )
        if out.shape[1:] != (len(shares), len(FEATURES)):
            raise ValueError(
                f"The store holds {list(out.shape[1:])} numbers a slot, the kernel writes "
                f"{[len(shares), len(FEATURES)]}."
            )
        if size != keys.view.shape[3] or self._n_heads % kv_heads:
            raise ValueError(
                f"Queries of {self._n_heads} heads of size {size} do not go with keys of "
                f"{kv_heads} heads of size {keys.view.shape[3]}."
            )
        heads = self._n_heads // kv_heads
        rows = (batch.starts, batch.lengths)
        walk[(n_rows, kv_heads, self._splits)](
            query, keys.view, self._state, *rows, batch.table, batch.slots, batch.prompts,
            batch.responses, shares if keys.scale is None else keys.scale,
            shares if query_scale is None else query_scale, shares,
            rule.scale, rule.soft_cap, *query.stride(),
            *keys.view.stride(), batch.table.stride(0),
            keys.view.shape[1], self._window, self._sink, sliding_window or 0,
            HEADS=heads, HEADS_PADDED=max(16, triton.next_power_of_2(heads)), KV_HEADS=kv_heads,
            GROUPS=len(shares), SIZE=size, SIZE_PADDED=max(16, triton.next_power_of_2(size)),
            TILE=self._tile, SPLITS=self._splits, ROWS=self._rows,
            CAPPED=rule.soft_cap > 0, SCALED_KEYS=keys.scale is not None,
            SCALED_QUERY=query_scale is not None,
            # Triton's interpreter multiplies the bits of bfloat16 as if they were integers.
            WIDE=query.device.type == "cpu",
        )  # fmt: skip
        merge[(n_rows,)](
            self._state, out, *rows, batch.slots, batch.prompts,
            shares if rule.sinks is None else rule.sinks, shares,
            batch.prompts if written is None else written, *out.stride(),
            HEADS=self._n_heads, HEADS_PADDED=triton.next_power_of_2(self._n_heads),
            GROUPS=len(shares), SPLITS=self._splits, ROWS=self._rows,
            LEARNT_SINKS=rule.sinks is not None, TELLS=written is not None,
        )  # fmt: skip


def write_tokens(
    logits: torch.Tensor,
    slots: torch.Tensor,
    owners: torch.Tensor,
    tokens: torch.Tensor,
    owner: torch.Tensor,
    tile: int = 4096,
) -> None:
    """Write `TOKEN_STATISTICS` of each row's logits, and whose row it is, at the row's slot.

    Args:
        logits: [N, V] at temperature 1; -inf where a word is masked.
        slots: [>= N] int32 slot of each row, -1 for one that is not traced.
        owners: [>= N] int32 whose row it is.
        tokens: [slots, K] the statistics' store.
        owner: [slots] the owners' store.
        tile: words a program reads at once, a power of two.
    Same definitions as `reference.token_statistics`; launches like `RowKernel`'s.
    """
    choices[(len(logits),)](
        logits, slots, owners, tokens, owner, *logits.stride(), logits.shape[1],
        tokens.stride(0), TILE=tile,
    )  # fmt: skip
