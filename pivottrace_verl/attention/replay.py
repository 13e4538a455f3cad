"""The same statistics from a Hugging Face model: for engines capture cannot serve, and as oracle.

The model reads prompt and output at once (teacher forcing) with eager attention; the softmax rows
are the model's own. Row i is the query at position P-1+i, the one whose logits choose generated
token i; the row of the last token itself is never computed while generating and is left out.

Axes: P prompt tokens, T generated tokens, L traced layers, H head groups, F features.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from pivottrace_verl.attention.channel import Trace
from pivottrace_verl.attention.config import TOKEN_STATISTICS, CaptureConfig
from pivottrace_verl.attention.heads import HeadConfig
from pivottrace_verl.attention.reference import TINY, dense_statistics, group_heads
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
    layers = config.choose_layers(_layers_to_choose_from(model, config))
    positions = torch.arange(prompt - 1, prompt - 1 + n_rows)
    ids = torch.tensor([[*prompt_ids, *output_ids[:-1]]], device=model.device)
    with torch.no_grad(), _attention_of(model, layers, positions) as rows:
        logits = model(ids, use_cache=False).logits[0, prompt - 1 :].double()
    _check_rows(model, layers, rows)
    stats = torch.stack(
        [
            group_heads(
                dense_statistics(*rows[layer][:2], positions, prompt, config, rows[layer][2]),
                config.choose_heads(len(rows[layer][0]), place),
            )
            for place, layer in enumerate(layers)
        ],
        dim=1,
    )
    log_p = logits.log_softmax(-1)
    entropy = torch.special.entr(log_p.exp()).sum(-1)
    certainty = -math.log(log_p.shape[-1]) - log_p.mean(-1)
    tokens = (values.float().cpu().numpy() for values in (entropy, certainty))
    return Trace(key, stats.float().numpy(), *tokens)


def head_distances(
    model: Any,
    rollouts: Sequence[tuple[Sequence[int], Sequence[int]]],
    layers: Sequence[int],
    config: HeadConfig,
    progress: Callable[[int], None],
) -> tuple[np.ndarray, np.ndarray]:
    """How far back each query head looks, and how much it leaves on the sink.

    Args:
        rollouts: (prompt ids, output ids), both with at least one token.
        progress: called with the number of rollouts read so far.
    Returns:
        [L, H] sum A[t,s] (t-s) / sum A[t,s] over all rows t that chose a token and all keys s past
        the sink (of the response only, if the configuration says so), in tokens; a row counts by
        the attention it has left there. [L, H] mean over the rows of the attention on the sink.
    """
    base = getattr(model, "base_model", model)  # the head's logits are not needed
    sums = torch.zeros(3, len(layers), model.config.get_text_config().num_attention_heads).double()
    n_rows = 0
    for done, (prompt_ids, output_ids) in enumerate(rollouts, start=1):
        prompt, n = len(prompt_ids), len(output_ids)
        positions = torch.arange(prompt - 1, prompt - 1 + n)
        ids = torch.tensor([[*prompt_ids, *output_ids[:-1]]], device=model.device)
        with torch.no_grad(), _attention_of(model, layers, positions) as rows:
            base(ids, use_cache=False)
        _check_rows(model, layers, rows)
        keys = torch.arange(prompt - 1 + n)
        first = max(prompt, config.sink) if config.response_only else config.sink
        distance = (positions[:, None] - keys).clamp(min=0).double() * (keys >= first)
        for i, layer in enumerate(layers):
            a = rows[layer][0].double()
            sums[0, i] += torch.einsum("hns,ns->h", a, distance)
            sums[1, i] += a[..., first:].sum((1, 2))
            sums[2, i] += a[..., : config.sink].sum((1, 2))
        n_rows += n
        progress(done)
    return (sums[0] / sums[1].clamp_min(TINY)).numpy(), (sums[2] / n_rows).numpy()


def full_attention_layers(model: Any) -> list[int]:
    """The layers of a model whose rows see the whole context."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [i for i, kind in enumerate(kinds) if kind == "full_attention"]


def _layers_to_choose_from(model: Any, config: CaptureConfig) -> list[int]:
    """As the capture's: layers with a sliding window only if they are named, or alone."""
    far = full_attention_layers(model)
    return (
        far
        if config.layers is None and far
        else list(range(model.config.get_text_config().num_hidden_layers))
    )


def _check_rows(model: Any, layers: Sequence[int], rows: Mapping[int, Any]) -> None:
    missing = [layer for layer in layers if layer not in rows]
    if missing:
        raise PivotTraceError(
            f"Layer {missing[0]} of {type(model).__name__} does not go through the model's "
            f"attention interface, so it cannot be replayed."
        )


@contextmanager
def _attention_of(
    model: Any, layers: Sequence[int], positions: torch.Tensor
) -> Iterator[dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]]:
    """While open, a forward pass fills the dict: layer -> probabilities [H, N, S], lse [H, N], and
    the probability of a learnt sink [H, N] where the model has one."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    rows: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = {}

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # The model file's own eager attention: its scaling, masks and caps, not ours.
        eager = sys.modules[type(module).__module__].eager_attention_forward
        output, weights = eager(module, query, key, *args, **kwargs)
        if module.layer_idx in layers:
            scores = _scores(
                query,
                key,
                kwargs["scaling"],
                kwargs.get("softcap"),
                positions,
                kwargs.get("sliding_window"),
            )
            lse, learnt = scores.logsumexp(-1), None
            if getattr(module, "sinks", None) is not None:
                sink = module.sinks.double()[:, None]
                lse = torch.logaddexp(lse, sink)
                learnt = (sink - lse).exp().cpu()
            rows[module.layer_idx] = (weights[0, :, positions].cpu(), lse.cpu(), learnt)
        return output, weights

    ALL_ATTENTION_FUNCTIONS.register(INTERFACE, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(INTERFACE, eager_mask)
    before = model.config._attn_implementation
    model.config._attn_implementation = INTERFACE
    try:
        yield rows
    finally:
        model.config._attn_implementation = before


def _scores(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    softcap: float | None,
    positions: torch.Tensor,
    sliding_window: int | None,
) -> torch.Tensor:
    """[H, N, S] from query [1, H, S, D] and key [1, H_kv, S, D] under a causal mask."""
    q = query[0, :, positions].double()
    k = key[0].double().repeat_interleave(q.shape[0] // key.shape[1], dim=0)
    scores = torch.einsum("hnd,hsd->hns", q, k) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = positions.to(k.device)[:, None] - torch.arange(k.shape[1], device=k.device)
    unseen = distance < 0
    if sliding_window is not None:
        unseen |= distance >= sliding_window
    return scores.masked_fill(unseen, -torch.inf)


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
