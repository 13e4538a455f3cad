"""The second forward pass gives each rollout's own hidden states, whatever it is batched with."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pivottrace_verl import hidden_states
from pivottrace_verl.attention.selftest import make_tiny_model
from pivottrace_verl.hidden_states import LayerStates


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("states") / request.param
    make_tiny_model(folder, request.param)
    return folder


def make_rollouts():
    g = torch.Generator().manual_seed(3)
    lengths = [(1, 1), (5, 20), (40, 3), (17, 30), (9, 9)]
    return [
        tuple(torch.randint(2, 384, (n,), generator=g).tolist() for n in pair) for pair in lengths
    ]


def token_by_token(folder, prompt, output):
    """The states while decoding: one token at a time, the cache carried along, no batch."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    cache, states = None, []
    ids = [*prompt, *output[:-1]]
    for position, token in enumerate(ids):
        with torch.no_grad():
            out = model(
                torch.tensor([[token]]),
                past_key_values=cache,
                use_cache=True,
                output_hidden_states=True,
            )
        cache = out.past_key_values
        if position >= len(prompt) - 1:
            states.append([layer[0, 0].numpy() for layer in out.hidden_states])
    assert len(states) == len(output)
    return np.mean(states, axis=0)


def close(a, b):
    """Equal up to float32's rounding, at each layer's own scale."""
    scale = np.abs(b).max(axis=-1, keepdims=True)
    return bool((np.abs(a - b) <= 1e-5 * scale).all())


def test_states_are_those_of_decoding_token_by_token(folder):
    rollouts = make_rollouts()
    found = LayerStates(folder)(rollouts)
    assert len(found) == len(rollouts)
    for states, (prompt, output) in zip(found, rollouts, strict=True):
        assert states.shape == (5, 128) and states.dtype == np.float32
        assert close(states, token_by_token(folder, prompt, output))


def test_batches_change_nothing_but_the_last_bits(folder, monkeypatch):
    read, rollouts = LayerStates(folder), make_rollouts()
    together = read(rollouts)
    monkeypatch.setattr(hidden_states, "TOKENS", 60)
    apart = read(rollouts)
    assert all(close(a, b) for a, b in zip(together, apart, strict=True))


def test_a_batch_holds_no_more_than_its_tokens_and_every_rollout_once(monkeypatch):
    monkeypatch.setattr(hidden_states, "TOKENS", 100)
    lengths = [10, 90, 30, 30, 30, 250, 5]
    batches = list(hidden_states.batches(lengths))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 100
