"""The choice of layers and heads: measured as defined, sink heads left out, frozen with its run."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers import AutoModelForCausalLM

from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.attention.heads import (
    FILE,
    HeadConfig,
    candidate_layers,
    captured_by,
    choose,
    frozen_choice,
    write_choice,
)
from pivottrace_verl.attention.replay import full_attention_layers, head_distances, replay
from pivottrace_verl.attention.selftest import make_tiny_model
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.pivots import FEATURES
from pivottrace_verl.pool import RunDir

ROLLOUTS = [([5, 9, 11, 40, 7, 8, 30], [3, 4, 77, 12, 9]), ([2, 6], [8, 8, 19])]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_tiny_model(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def run(tmp_path):
    """A run directory whose model is a folder of the right files."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    rows = [{"prompt": [{"role": "user", "content": f"{i}?"}], "data_source": "s"} for i in "ab"]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RunDir.create(tmp_path / "run", tmp_path / "pool.jsonl", tmp_path / "model")


def by_hand(model, layers, config):
    """Distances and sink masses by the definition, key by key, from the model's own weights."""
    model.set_attn_implementation("eager")
    far = np.zeros((len(layers), 4))
    left, sink, n = far.copy(), far.copy(), 0
    for prompt, output in ROLLOUTS:
        ids = torch.tensor([prompt + output[:-1]])
        with torch.no_grad():
            weights = model(ids, output_attentions=True).attentions
        for i, layer in enumerate(layers):
            for head in range(4):
                for t in range(len(prompt) - 1, len(prompt) - 1 + len(output)):
                    for s in range(t + 1):
                        a = float(weights[layer][0, head, t, s])
                        sink[i, head] += a * (s < config.sink)
                        if s >= config.sink and (s >= len(prompt) or not config.response_only):
                            far[i, head] += a * (t - s)
                            left[i, head] += a
        n += len(output)
    return far / left, sink / n


@pytest.mark.parametrize("response_only", [False, True])
def test_distances_are_those_of_the_definition(model, response_only):
    config = HeadConfig(sink=1, response_only=response_only)
    seen = []
    found = head_distances(model, ROLLOUTS, (1, 2), config, seen.append)
    for ours, theirs in zip(found, by_hand(model, (1, 2), config), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert seen == [1, 2]


def test_a_trace_of_chosen_heads_is_the_mean_over_each_layers_own(model):
    prompt, output = ROLLOUTS[0]
    single = CaptureConfig(layers=(1, 2), head_groups=((0,), (1,), (2,), (3,)))
    chosen = CaptureConfig(layers=(1, 2), heads=((0, 3), (2,)))
    every = replay(model, prompt, output, single).stats
    found = replay(model, prompt, output, chosen).stats
    assert found.shape == (len(output), 2, 1, len(FEATURES))
    np.testing.assert_allclose(found[:, 0, 0], every[:, 0, [0, 3]].mean(1), atol=1e-6)
    np.testing.assert_allclose(found[:, 1, 0], every[:, 1, 2], atol=1e-6)


@pytest.mark.parametrize(
    ("n", "wanted", "chosen"),
    [(30, 5, (11, 13, 15, 17, 19)), (28, 2, (11, 16)), (4, 5, (1, 2)), (1, 5, (0,))],
)
def test_candidates_lie_evenly_in_the_middle_third(n, wanted, chosen):
    assert candidate_layers(range(n), wanted) == chosen


def test_sliding_layers_are_no_candidates(model):
    assert full_attention_layers(model) == [0, 1, 2, 3]
    kinds = ["sliding_attention", "full_attention"] * 2
    model.config.layer_types = kinds
    try:
        assert full_attention_layers(model) == [1, 3]
    finally:
        model.config.layer_types = None
    with pytest.raises(PivotTraceError, match="no full attention layer"):
        candidate_layers([], 5)


@settings(max_examples=60, deadline=None)
@given(
    distance=arrays(np.float64, (3, 4), elements=st.floats(0, 100)),
    sink=arrays(np.float64, (3, 4), elements=st.floats(0, 1)),
    share=st.floats(0.01, 1),
)
def test_kept_heads_are_the_farthest_that_are_no_sink_heads(distance, sink, share):
    config = HeadConfig(share=share)
    real = sink <= config.max_sink
    if not real.any():
        with pytest.raises(PivotTraceError, match="raise --max-sink"):
            choose((4, 5, 6), distance, sink, config)
        return
    chosen = choose((4, 5, 6), distance, sink, config)
    kept = np.zeros((3, 4), bool)
    for layer, heads in chosen.items():
        kept[layer - 4, list(heads)] = True
    assert all(chosen.values())
    assert kept.sum() == min(int(np.ceil(share * 12)), real.sum())
    assert not kept[~real].any()
    rest = distance[real & ~kept]
    assert not len(rest) or distance[kept].min() >= rest.max()


@pytest.mark.parametrize(
    "changed", [{"rollouts": 0}, {"n_layers": 0}, {"share": 0.0}, {"share": 1.5}, {"max_sink": 0.0}]
)
def test_settings_out_of_range_are_refused(changed):
    with pytest.raises(PivotTraceError):
        HeadConfig(**changed)


def freeze(run):
    distance, sink = np.array([[1.0, 2.0], [4.0, 3.0]]), np.zeros((2, 2))
    config = HeadConfig(share=0.5)
    return write_choice(run, choose((1, 3), distance, sink, config), (1, 3), distance, sink, config)


def test_a_choice_is_frozen_with_its_run_and_read_back(run):
    assert frozen_choice(run) is None
    written = freeze(run)
    assert written == json.loads((run.path / FILE).read_text())
    assert frozen_choice(run) == {"layers": (3,), "heads": ((0, 1),)}


def test_a_run_captures_what_it_was_scored_with_and_before_that_what_was_chosen(run):
    assert captured_by(run) == CaptureConfig()
    freeze(run)
    chosen = CaptureConfig(layers=(3,), heads=((0, 1),))
    assert captured_by(run) == chosen
    scored = CaptureConfig(layers=(2,), window=16)
    run.update_manifest(settings={"score": {"capture": scored.to_dict()}})
    assert captured_by(run) == chosen, "scoring has begun, and may begin anew"
    (run.path / "scores").mkdir()
    (run.path / "scores" / "part-00000.parquet").touch()
    assert captured_by(run) == scored
    run.update_manifest(settings={"score": {}})
    with pytest.raises(PivotTraceError, match="does not say what the scores"):
        captured_by(run)


def test_a_choice_made_for_another_model_is_refused_with_both_sides(run):
    freeze(run)
    now = run.stage_fingerprint("model")
    run.update_manifest(model={"fingerprint": "0" * 16})
    with pytest.raises(PivotTraceError, match=f"{now}.*{'0' * 16}.*pivottrace calibrate"):
        frozen_choice(run)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", "one JSON object"),
        ("{}", "nothing that it names"),
        ({"capture": {}}, "holds no layers and heads"),
        ({"capture": {"layers": [1], "heads": [[0], [1]]}}, "heads of 2 layers"),
        ({"capture": {"layers": [1], "heads": "x"}}, "list of lists"),
    ],
)
def test_a_broken_file_is_told(run, content, says):
    if isinstance(content, dict):
        content = json.dumps(freeze(run) | content)
    (run.path / FILE).write_text(content)
    with pytest.raises(PivotTraceError, match=says):
        frozen_choice(run)
