"""The same statistics from a Hugging Face model: for engines capture cannot serve, and as oracle.

The model reads prompt and output at once (teacher forcing) with eager attention; the softmax rows
are the model's own. Row i is the query at position P-1+i, the one whose logits choose generated
token i; the row of the last token itself is never computed while generating and is left out.

Axes: P prompt tokens, T generated tokens, L traced layers, H head groups, F features.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from pivottrace_verl.attention.channel import Trace
from pivottrace_verl.attention.config import TOKEN_STATISTICS, CaptureConfig
from pivottrace_verl.attention.reference import dense_statistics, group_heads
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.pivots import FEATURES

INTERFACE = "pivottrace_replay"


def replay(
    model: Any,
    prompt_ids: Sequence[int],
    output_ids: Sequence[int],
    config: CaptureConfig,
    key: str = "replay",
) -> Trace:
    """The trace of one rollout, by a forward pass of `model` (use float32 for exact figures).

    Raises PivotTraceError for an empty prompt or output, and for layers the model does not have.
    """
    if not prompt_ids or not output_ids:
        raise PivotTraceError("A replay needs at least one prompt token and one output token.")
    prompt, n_rows = len(prompt_ids), len(output_ids)
    layers = config.choose_layers(range(model.config.get_text_config().num_hidden_layers))
    positions = torch.arange(prompt - 1, prompt - 1 + n_rows)
    ids = torch.tensor([[*prompt_ids, *output_ids[:-1]]], device=model.device)
    with torch.no_grad(), _attention_of(model, layers, positions) as rows:
        logits = model(ids, use_cache=False).logits[0, prompt - 1 :].double()
    missing = [layer for layer in layers if layer not in rows]
    if missing:
        raise PivotTraceError(
            f"Layer {missing[0]} of {type(model).__name__} does not go through the model's "
            f"attention interface, so it cannot be replayed."
        )
    stats = torch.stack(
        [
            group_heads(
                dense_statistics(*rows[layer], positions, prompt, config),
                config.choose_heads(len(rows[layer][0])),
            )
            for layer in layers
        ],
        dim=1,
    )
    log_p = logits.log_softmax(-1)
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    certainty = -math.log(log_p.shape[-1]) - log_p.mean(-1)
    tokens = (values.float().cpu().numpy() for values in (entropy, certainty))
    return Trace(key, stats.float().numpy(), *tokens)


@contextmanager
def _attention_of(
    model: Any, layers: Sequence[int], positions: torch.Tensor
) -> Iterator[dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """While open, a forward pass fills the dict: layer -> probabilities [H, N, S], lse [H, N]."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    rows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # The model file's own eager attention: its scaling, masks and caps, not ours.
        eager = sys.modules[type(module).__module__].eager_attention_forward
        output, weights = eager(module, query, key, *args, **kwargs)
        if module.layer_idx in layers:
            lse = _log_sum_exp(query, key, kwargs["scaling"], positions)
            rows[module.layer_idx] = (weights[0, :, positions].cpu(), lse.cpu())
        return output, weights

    ALL_ATTENTION_FUNCTIONS.register(INTERFACE, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(INTERFACE, eager_mask)
    before = model.config._attn_implementation
    model.config._attn_implementation = INTERFACE
    try:
        yield rows
    finally:
        model.config._attn_implementation = before


def _log_sum_exp(
    query: torch.Tensor, key: torch.Tensor, scaling: float, positions: torch.Tensor
) -> torch.Tensor:
    """[H, N] from query [1, H, S, D] and key [1, H_kv, S, D] under a causal mask."""
    q = query[0, :, positions].double()
    k = key[0].double().repeat_interleave(q.shape[0] // key.shape[1], dim=0)
    scores = torch.einsum("hnd,hsd->hns", q, k) * scaling
    later = torch.arange(k.shape[1], device=k.device) > positions.to(k.device)[:, None]
    return scores.masked_fill(later, -torch.inf).logsumexp(-1)


def compare(trace: Trace, reference: Trace, config: CaptureConfig) -> dict[str, float]:
    """Largest absolute difference of each feature, distances in units of their window, and of
    the token statistics.

    Raises PivotTraceError where the two traces do not have the same shape.
    """
    if trace.stats.shape != reference.stats.shape:
        raise PivotTraceError(
            f"Traces of shape {trace.stats.shape} and {reference.stats.shape} cannot be compared."
        )
    difference = np.abs(trace.stats - reference.stats).max(axis=(0, 1, 2))
    errors = {
        name: float(value) / (config.window if name.endswith("distance") else 1)
        for name, value in zip(FEATURES, difference, strict=True)
    }
    tokens = {
        name: float(np.abs(getattr(trace, name) - getattr(reference, name)).max())
        for name in TOKEN_STATISTICS
    }
    return {**errors, **tokens}
