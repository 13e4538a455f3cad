"""What is captured of each kind of model equals dense attention, in a crowded engine.

`engine_models.py` runs the workload: a shared prefix, chunked prompts, preemptions, children,
aborts and requests that do not ask, all at once. The other models, and bfloat16: `pytest -m slow`
of this file.
"""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.attention.replay import compare, replay
from pivottrace_verl.pivots import FEATURES

pytestmark = pytest.mark.vllm

TOLERANCE = 1e-4
HALF_TOLERANCE, HALF_CORRELATION = 0.02, 0.99
"""Of a bfloat16 engine against attention in float32: mean absolute error of a feature, distances in
units of their window, and correlation."""
MODELS = ("gemma3", "llama", "qwen2", "qwen3", "mistral")
DTYPES = ("float32", "bfloat16")
EACH = [
    pytest.param((name, dtype), id=f"{name}-{dtype}", marks=[pytest.mark.slow] * (number > 0))
    for number, (dtype, name) in enumerate((dtype, name) for dtype in DTYPES for name in MODELS)
]


@pytest.fixture(scope="module", params=EACH)
def runs(request, run_engines):
    model, dtype = request.param
    runs = run_engines("engine_models.py", model, dtype)
    runs.dtype = dtype
    return runs


def test_every_token_of_every_request_that_asked_has_its_row(runs):
    model = AutoModelForCausalLM.from_pretrained(runs.scratch / "model", dtype=torch.float32).eval()
    config = CaptureConfig.from_dict(runs.config)
    worst, pairs = 0.0, []
    for key, tokens in runs.tokens.items():
        number = int(key.partition("/")[0])
        trace = runs.traces.get(key)
        assert (trace is not None) == (number % 3 != 1), key
        if trace is None:
            continue
        assert len(trace.stats) == len(tokens) == runs.lengths[str(number)]
        replayed = replay(model, runs.prompts[number], tokens, config)
        worst = max(worst, *compare(trace, replayed, config).values())
        pairs.append((trace.stats, replayed.stats))
    print(f"max_abs_error {worst:.2e}")
    if runs.dtype == "float32":
        assert worst <= TOLERANCE
        return
    for i, name in enumerate(FEATURES):
        found, dense = (np.concatenate([pair[side][..., i].ravel() for pair in pairs])
                        for side in (0, 1))  # fmt: skip
        scale = config.window if name.endswith("distance") else 1
        assert np.abs(found - dense).mean() / scale < HALF_TOLERANCE, name
        if name.startswith("bucket") and not dense.any():
            continue  # no context is as long
        assert np.corrcoef(found, dense)[0, 1] > HALF_CORRELATION, name


def test_the_engine_was_crowded_and_nothing_was_lost(runs):
    assert len(runs.prompts) == 64
    assert len(runs.tokens) == 67  # one has four children
    assert len(set(runs.lengths.values())) == 2  # some were aborted
    assert runs.facts["hello"]["layers"] == [0, 1, 2, 3]
    assert runs.facts["preemptions"] >= 4
    assert runs.facts["cached"] >= 96
    assert runs.facts["compiled"]
    counters = runs.facts["counters"]
    assert counters.pop("missing") == 67 - len(runs.traces)  # those that did not ask
    assert counters.pop("received") == len(runs.traces)
    assert not any(counters.values())


def test_greedy_tokens_are_those_of_an_engine_without_capture(runs):
    children = {key.partition("/")[0] for key in runs.tokens if "/" in key}
    greedy = [key for key in runs.tokens if key.partition("/")[0] not in children]
    assert len(greedy) == 63
    assert {key: runs.tokens[key] for key in greedy} == {key: runs.off[key] for key in greedy}
