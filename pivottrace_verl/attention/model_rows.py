"""Softmax rows of a Hugging Face model's attention, handed over while it reads.

In a traced layer attention is the model file's own eager one, in float32, a few queries at a time:
what is held grows with the length of a sequence and not with its square, but for the mask. The
other layers go the fast way where that computes the same.

Axes: P prompt tokens, T generated tokens, H query heads, N rows, S keys, D head size.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from pivottrace_verl.errors import PivotTraceError

INTERFACE = "pivottrace_replay"
ELEMENTS = 1 << 24
"""Attention probabilities, or log-probabilities of words, that are worked on at once."""

Ids = Sequence[int]


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of one sequence in one layer."""

    sequence: int
    """Place in the batch."""
    layer: int
    positions: torch.Tensor
    """[N]"""
    probabilities: torch.Tensor
    """[H, N, S] up to the last position or beyond."""
    lse: torch.Tensor
    """[H, N]"""
    learnt: torch.Tensor | None
    """[H, N] the probability of a learnt sink, where the model has one."""


def spans_of(rollouts: Sequence[tuple[Ids, Ids]]) -> list[range]:
    """The positions that chose a token."""
    return [range(len(p) - 1, len(p) - 1 + len(o)) for p, o in rollouts]


@contextmanager
def attention_of(
    model: Any, layers: Sequence[int], spans: Sequence[range], take: Callable[[Rows], None]
) -> Iterator[None]:
    """While open, a forward pass hands over the rows of `layers` at each sequence's span of
    positions, a few at a time and in order.

    Raises PivotTraceError at the end if a layer was not seen.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen = set()
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> Any:
        traced = module.layer_idx in layers
        if not traced and model._supports_sdpa and kwargs.get("softcap") is None:
            return sdpa(module, query, key, value, mask, **kwargs)
        seen.add(module.layer_idx)
        # The model file's own eager attention: its scaling, masks and caps, not ours. In float32,
        # since it rounds its probabilities to the precision of the values.
        eager = sys.modules[type(module).__module__].eager_attention_forward
        q, k, v = query.float(), key.float(), value.float()
        batch, n_heads, length = query.shape[:3]
        step = max(1, ELEMENTS // (batch * n_heads * length))
        outputs = []
        for first in range(0, length, step):
            end = min(first + step, length)
            # Causal: no row sees a key beyond its own, so later ones can be left out.
            seen_by = None if mask is None else mask[:, :, first:end, :end]
            output, weights = eager(
                module, q[:, :, first:end], k[:, :, :end], v[:, :, :end], seen_by, **kwargs
            )
            outputs.append(output.to(query.dtype))
            for place, span in enumerate(spans if traced else ()):
                low, high = max(first, span.start), min(end, span.stop)
                if low < high:
                    positions = torch.arange(low, high)
                    scores = _scores(q[place, :, low:high], k[place, :, :end], positions, kwargs)
                    lse, learnt = _with_sink(scores.logsumexp(-1), module)
                    rows = weights[place, :, low - first : high - first]
                    take(Rows(place, module.layer_idx, positions, rows, lse, learnt))
        return torch.cat(outputs, dim=1), None

    ALL_ATTENTION_FUNCTIONS.register(INTERFACE, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(INTERFACE, eager_mask)
    before = model.config._attn_implementation
    model.config._attn_implementation = INTERFACE
    try:
        yield
    finally:
        model.config._attn_implementation = before
    missing = [layer for layer in layers if layer not in seen]
    if missing:
        raise PivotTraceError(
            f"Layer {missing[0]} of {type(model).__name__} does not go through the model's "
            f"attention interface, so it cannot be replayed."
        )


def _with_sink(lse: torch.Tensor, module: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[H, N] log-sum-exp over the keys -> the same with the layer's learnt sink, if it has one, and
    that sink's probability."""
    if getattr(module, "sinks", None) is None:
        return lse, None
    sink = module.sinks.double()[:, None]
    lse = torch.logaddexp(lse, sink)
    return lse, (sink - lse).exp()


def _scores(
    query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, rule: dict[str, Any]
) -> torch.Tensor:
    """[H, N, S] from query [H, N, D] and key [H_kv, S, D] under a causal mask; `rule` is what the
    model hands to its attention."""
    k = key.double().repeat_interleave(query.shape[0] // key.shape[0], dim=0)
    scores = torch.einsum("hnd,hsd->hns", query.double(), k) * rule["scaling"]
    softcap, sliding_window = rule.get("softcap"), rule.get("sliding_window")
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = positions.to(k.device)[:, None] - torch.arange(k.shape[1], device=k.device)
    unseen = distance < 0
    if sliding_window is not None:
        unseen |= distance >= sliding_window
    return scores.masked_fill(unseen, -torch.inf)
