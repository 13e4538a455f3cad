"""Hidden states of finished rollouts, from a forward pass of the same model in Hugging Face.

vLLM does not hand out hidden states while it generates, so the model reads prompt and output once
more (teacher forcing), on the CPU in float32. That costs about as much as a prefill of every
rollout, which is why scoring does it only when asked (`pivottrace score --hidden-states`).

Contract: a result depends on its own rollout; how rollouts are batched shows in the last bits at
most, and the same rollouts are batched the same way.
Axes: P prompt tokens, T generated tokens, L layers, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

TOKENS = 4096
"""Tokens of a batch, padding included: what is held at once is L + 1 states of each."""


class LayerStates:
    """The model, loaded once; called with rollouts."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoModelForCausalLM

        whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        # Without the head: logits over the vocabulary would cost more than they are worth here.
        self._model = whole.base_model.eval()

    def __call__(self, rollouts: Sequence[tuple[list[int], list[int]]]) -> list[np.ndarray]:
        """Of each (prompt ids [P], output ids [T]) the states [L + 1, D] float32 after the
        embedding and after each layer, mean over the T positions whose logits chose the output.

        The last state is the one the final norm has passed, as Hugging Face returns it.
        """
        found: dict[int, np.ndarray] = {}
        for batch in batches([len(p) + len(o) - 1 for p, o in rollouts]):
            ids = padded([rollouts[i] for i in batch])
            with torch.no_grad():
                states = self._model(ids, output_hidden_states=True, use_cache=False).hidden_states
            for row, i in enumerate(batch):
                first = len(rollouts[i][0]) - 1
                end = first + max(len(rollouts[i][1]), 1)
                means = [layer[row, first:end].double().mean(0).float() for layer in states]
                found[i] = torch.stack(means).numpy()
        return [found[i] for i in range(len(rollouts))]


def padded(rollouts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> torch.Tensor:
    """Of each (prompt ids, output ids) the P + T - 1 tokens whose logits are needed. Padding comes
    last, where causal attention keeps it from what is read, so no mask has to."""
    ids = [[*prompt, *output[:-1]] for prompt, output in rollouts]
    longest = max(map(len, ids))
    return torch.tensor([row + [0] * (longest - len(row)) for row in ids])


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices, longest first, in batches of at most TOKENS padded tokens (at least one rollout)."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while order:
        fitting = max(1, TOKENS // lengths[order[0]])
        yield order[:fitting]
        order = order[fitting:]
