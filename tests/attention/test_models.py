"""What is captured of each kind of model equals dense attention, in a crowded engine.

`engine_models.py` runs the workload: a shared prefix, chunked prompts, preemptions, children,
aborts and requests that do not ask, all at once. The other models: `pytest -m slow` of this file.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.attention.replay import compare, replay

pytestmark = pytest.mark.vllm

TOLERANCE = 1e-4
slow = [
    pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "qwen2", "qwen3", "mistral")
]


@pytest.fixture(scope="module", params=["gemma3", *slow])
def runs(request, run_engines):
    return run_engines("engine_models.py", request.param, "float32")


def test_every_token_of_every_request_that_asked_has_its_row(runs):
    model = AutoModelForCausalLM.from_pretrained(runs.scratch / "model", dtype=torch.float32).eval()
    config = CaptureConfig.from_dict(runs.config)
    worst = 0.0
    for key, tokens in runs.tokens.items():
        number = int(key.partition("/")[0])
        trace = runs.traces.get(key)
        assert (trace is not None) == (number % 3 != 1), key
        if trace is None:
            continue
        assert len(trace.stats) == len(tokens) == runs.lengths[str(number)]
        replayed = replay(model, runs.prompts[number], tokens, config)
        worst = max(worst, *compare(trace, replayed, config).values())
    print(f"max_abs_error {worst:.2e}")
    assert worst <= TOLERANCE


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
