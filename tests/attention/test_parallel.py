"""Engines with several workers, and engines that draft tokens: their traces equal dense attention
of the same model, and their tokens are those of the same engine without capture.

Engines run in processes of their own (`engine_parallel.py`).
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.attention.replay import compare, replay

pytestmark = pytest.mark.vllm

TOLERANCE = 1e-4
SLOW = ("tensor", "pipeline", "first_stage", "both", "data", "drafts")
# Workers that capture: ranks x stages x replicas.
WORKERS = {
    "tensor": 2,
    "replicated": 2,
    "pipeline": 2,
    "first_stage": 2,
    "both": 4,
    "data": 2,
    "drafts": 1,
}
# A pipeline on a CPU needs vLLM to warm up, which a real compiler would make slow.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_CPU_CI_ENV": "1",
    "TORCHDYNAMO_DISABLE": "1",
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(k, marks=[pytest.mark.slow] if k in SLOW else []) for k in WORKERS],
)
def engine(request, run_engines):
    """What one kind of engine did."""
    found = run_engines("engine_parallel.py", request.param, **ENVIRONMENT)
    found.kind = request.param
    found.config = CaptureConfig.from_dict(found.run["facts"]["config"])
    found.model = AutoModelForCausalLM.from_pretrained(
        found.scratch / "model", dtype=torch.float32
    ).eval()
    return found


def test_every_token_has_one_row_and_it_equals_dense_attention(engine):
    for scenario, requests in engine.run["requests"].items():
        worst = {}
        for request in requests:
            trace = engine.traces.get(request["key"])
            assert trace is not None, f"{request['key']} has no trace"
            assert len(trace.stats) == len(trace.token_entropy) == len(request["tokens"]) > 0
            dense = replay(engine.model, request["prompt"], request["tokens"], engine.config)
            errors = compare(trace, dense, engine.config)
            worst = {name: max(error, worst.get(name, 0)) for name, error in errors.items()}
        print(f"max_abs_error {engine.kind} {scenario} {max(worst.values()):.2e}")
        assert max(worst.values()) <= TOLERANCE, (scenario, worst)


def test_greedy_tokens_are_identical_with_capture_on_and_off(engine):
    on, off = engine.run["requests"]["greedy"], engine.run["off"]
    assert [request["tokens"] for request in on] == [request["tokens"] for request in off]


def test_the_scenarios_happened_and_nothing_was_lost(engine):
    facts = engine.run["facts"]
    assert {name: len(r) for name, r in engine.run["requests"].items()} == {
        "greedy": 3,
        "sampled": 4,
        "loops": 3,
        "resumed": 3,
        "crowded": 8,
    }
    assert facts["workers"] == WORKERS[engine.kind]
    assert facts["hello"]["layers"] == list(engine.config.choose_layers(range(4)))
    if engine.kind != "data":  # two caches
        assert facts["preemptions"] > 0
    if engine.kind == "drafts":
        assert facts["accepted"] > 100
        assert facts["drafted"] - facts["accepted"] > 100
    counters = facts["counters"]
    assert counters.pop("received") == 3 + 4 + 3 + 2 * 3 + 8
    assert not any(counters.values())
    assert facts["held"] == []
