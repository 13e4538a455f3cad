"""Engines with several workers: what each contributes to a trace, and the trace made of it.

Tensor parallel ranks hold a layer's query heads in equal consecutive shares, pipeline stages hold
layers; the next-token distribution is the last stage's. Each worker that has something to say
sends its own part of every trace, and the receiver joins the parts: a group's statistics are the
mean over its heads wherever these are, so a part counts by the number of query heads it averaged
(keys that several ranks keep a copy of change nothing). A trace is whole when every part is there.

Axes: T generated tokens, L traced layers, H head groups, F features, K `TOKEN_STATISTICS`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

Groups = tuple[tuple[int, ...], ...]


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one worker sends of each trace."""

    number: int
    """Which part this is, from 0."""
    of: int
    """How many parts make a trace."""
    layers: tuple[int, ...]
    """Places of its layers among the traced layers."""
    heads: tuple[tuple[int, ...], ...]
    """Of each of its layers how many query heads of each group it averaged."""
    tokens: bool
    """Whether it holds the token statistics."""


@dataclass(frozen=True)
class Place:
    """Where a worker stands in its engine."""

    tensor_rank: int = 0
    tensor_size: int = 1
    stage: int = 0
    n_stages: int = 1

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.n_stages - 1

    @property
    def has_logits(self) -> bool:
        """Token statistics are taken once: on the last stage's first rank."""
        return self.is_last_stage and self.tensor_rank == 0


def own_heads(groups: Groups, n_heads: int, rank: int) -> Groups:
    """Of each group, in the layer's head numbers, the heads that tensor rank `rank` holds, in its
    own numbers; every rank holds `n_heads`."""
    first = rank * n_heads
    return tuple(
        tuple(head - first for head in group if first <= head < first + n_heads) for group in groups
    )


def divide(
    stages: Sequence[int], groups: Sequence[Groups], n_heads: int, place: Place
) -> list[Part | None]:
    """What every worker of an engine sends, by stage, then tensor rank; None: nothing.

    Args:
        stages: [L] the stage that holds each traced layer.
        groups: [L] head groups in the layer's head numbers.
        n_heads: query heads of a layer on each tensor rank.
        place: of any worker of the engine.
    """
    drafts: list[tuple[tuple[int, ...], tuple[tuple[int, ...], ...], bool]] = []
    for stage in range(place.n_stages):
        for rank in range(place.tensor_size):
            counts = {
                layer: tuple(len(own) for own in own_heads(groups[layer], n_heads, rank))
                for layer, holder in enumerate(stages)
                if holder == stage
            }
            held = tuple(layer for layer, count in counts.items() if any(count))
            worker = Place(rank, place.tensor_size, stage, place.n_stages)
            drafts.append((held, tuple(counts[layer] for layer in held), worker.has_logits))
    of = sum(1 for held, _, tokens in drafts if held or tokens)
    parts: list[Part | None] = []
    for held, heads, tokens in drafts:
        number = sum(part is not None for part in parts)
        parts.append(Part(number, of, held, heads, tokens) if held or tokens else None)
    return parts


def merge(
    parts: Sequence[tuple[Part, np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    """stats [T, L, H, F] and token statistics [T, K] of a trace from (part, its stats [T, l, H, F],
    its token statistics [T, K]) of all its workers.

    T is that of the shortest part: a worker may have computed rows past the last token.
    Raises ValueError where the parts do not make one trace.
    """
    numbers = sorted(part.number for part, _, _ in parts)
    n_layers = 1 + max((layer for part, _, _ in parts for layer in part.layers), default=-1)
    holders = [tokens for part, _, tokens in parts if part.tokens]
    shapes = {stats.shape[2:] for _, stats, _ in parts}
    if numbers != list(range(parts[0][0].of)) or len(holders) != 1 or len(shapes) != 1:
        raise ValueError(f"parts {numbers} of {parts[0][0].of}, head groups and features {shapes}")
    n_rows = min(len(stats) for _, stats, _ in parts)
    (group_shape,) = shapes
    total = np.zeros((n_rows, n_layers, *group_shape), np.float32)
    heads = np.zeros((n_layers, group_shape[0]), np.float32)
    for part, stats, _ in parts:
        for place, layer in enumerate(part.layers):
            weight = np.array(part.heads[place], np.float32)
            # A group without heads here has no mean, which must not spoil that of the others.
            there = weight > 0
            total[:, layer, there] += weight[there, None] * stats[:n_rows, place, there]
            heads[layer] += weight
    if not heads.all():
        raise ValueError(f"no worker has heads of some group of layers 0 to {n_layers - 1}")
    return total / heads[:, :, None], holders[0][:n_rows]
