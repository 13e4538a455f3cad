"""What an engine's first requests must prove: their rows are right, and none is missing.

The captured row was read from the KV cache, through block tables and at slots. Here the same row is
computed, densely and on the host, from the queries and keys that the layer was called with; where a
whole prompt was computed in one step the two must agree. A check that fails stops the engine.
"""

import torch

from pivottrace_verl.attention.config import WITHOUT_CAPTURE, CaptureConfig
from pivottrace_verl.attention.reference import ScoreRule, dense_statistics
from pivottrace_verl.pivots import FEATURES

FIRST = 4
"""Requests of an engine that are checked, and prompts of each traced layer."""
LONGEST = 512
"""Tokens of a prompt that is checked, so that the check is not felt."""
TOLERANCE = 0.01
"""Of a feature, distances in units of their window, log-sum-exp relative to its size; a row that
was read at another place is off by far more. Keys and queries of 16 bits need no wider bound: both
sides read the same numbers, whose products float32 holds exactly."""


def dense_row(
    query: torch.Tensor,
    key: torch.Tensor,
    response_start: int,
    rule: ScoreRule,
    sliding_window: int | None,
    config: CaptureConfig,
) -> torch.Tensor:
    """Statistics [H, F] of the last token of a prompt.

    Args:
        query: [H, D] of that token.
        key: [S, H_kv, D] of the whole prompt.
        response_start: position of the rollout's first generated token; S, or less where the
            request goes on with a rollout.
        rule: the layer's.
        sliding_window: keys the token sees, its own included; None: all.
    """
    query, key = query.cpu(), key.cpu()
    length, kv_heads = key.shape[:2]
    keys = key.double().repeat_interleave(len(query) // kv_heads, dim=1)
    scores = torch.einsum("hd,shd->hs", query.double(), keys) * rule.scale
    if rule.soft_cap:
        scores = rule.soft_cap * torch.tanh(scores / rule.soft_cap)
    if sliding_window is not None:
        scores[:, : max(0, length - sliding_window)] = -torch.inf
    lse, learnt = scores.logsumexp(-1, keepdim=True), None
    if rule.sinks is not None:
        sinks = rule.sinks.cpu().double()[:, None]
        lse = torch.logaddexp(lse, sinks)
        learnt = (sinks - lse).exp()
    position = torch.tensor([length - 1])
    rows = (scores - lse).exp()[:, None]
    return dense_statistics(rows, lse, position, response_start, config, learnt)[0]


def check_row(captured: torch.Tensor, expected: torch.Tensor, layer: int, window: int) -> None:
    """Compare a captured row [G, F] with the expected one.

    Raises RuntimeError where they differ.
    """
    error = (captured.double() - expected).abs()
    for place, name in enumerate(FEATURES):
        if name == "lse":
            error[:, place] /= expected[:, place].abs().clamp_min(1)
        elif name.endswith("distance"):
            error[:, place] /= window
    worst = float(error.max())
    if not worst <= TOLERANCE:
        name = FEATURES[int(error.amax(0).argmax())]
        raise RuntimeError(
            f"What attention capture read in layer {layer} for a first prompt is not what the "
            f"layer attended to ({name} is off by {worst:.2g}), so traces would be wrong; "
            f"{WITHOUT_CAPTURE}."
        )


def check_complete(key: str, n_rows: int, missing_rows: int) -> None:
    """Raises RuntimeError where a first request has fewer captured rows than generated tokens."""
    if missing_rows:
        raise RuntimeError(
            f"Attention capture has {n_rows - missing_rows} rows for the {n_rows} tokens generated "
            f"for the first request {key!r}; {WITHOUT_CAPTURE}."
        )
