"""The check for machines with a GPU: it cannot run here, but it starts, refuses and compares."""

import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from pivottrace_verl.attention.selftest import tiny_engine
from pivottrace_verl.pivots import FEATURES
from tests.recipes.recipe_scripts import RECIPES, load

HERE = RECIPES / "gpu_check"
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def run(*command, **environment):
    return subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        | {"PYTHONPATH": str(RECIPES.parent)}
        | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("script", ["check.py", "engine.py"])
def test_the_scripts_say_what_they_do(script):
    told = run(sys.executable, HERE / script, "--help")
    assert told.returncode == 0, told.stderr
    assert "GPU" in told.stdout or "engine" in told.stdout


def test_without_a_folder_the_script_says_what_it_wants():
    told = run("bash", HERE / "run.sh")
    assert (told.returncode, "Not yet run on a GPU" in told.stdout) == (0, True)


@no_gpu
def test_a_machine_without_a_gpu_is_refused_with_a_sentence_and_nothing_written(tmp_path):
    out = tmp_path / "out"
    for command in (["bash", HERE / "run.sh", out], [sys.executable, HERE / "check.py", out]):
        told = run(*command)
        assert told.returncode == 2
        assert "needs a GPU that torch sees, and there is none here" in told.stderr
        assert not out.exists()


def test_bad_arguments_are_told_before_anything_is_run(tmp_path):
    told = run(sys.executable, HERE / "check.py", tmp_path / "out", "--runners", "v3")
    assert (told.returncode, "must be of v1, v2, not v3" in told.stderr) == (2, True)
    told = run(sys.executable, HERE / "check.py", tmp_path / "out", "--model", tmp_path)
    assert (told.returncode, "no Hugging Face model" in told.stderr) == (2, True)


GIB = 1 << 30


@pytest.mark.parametrize(
    ("who", "gpu_gib"),
    [
        ("doctor and equality", 16),
        ("doctor and equality", 80),
        ("decode", 24),
        ("decode", 80),
        ("a tiny model at vLLM's default", 16),
        ("a tiny model at vLLM's default", 80),
    ],
)
def test_the_store_fits_beside_the_cache_of_the_engines_that_are_made(who, gpu_gib, monkeypatch):
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    from pivottrace_verl.attention.device_capture import check_memory
    from pivottrace_verl.attention.device_store import DeviceStore
    from pivottrace_verl.attention.selftest import GPU_HEAD_DIM, make_tiny_model

    engine, total = load("gpu_check/engine"), gpu_gib * GIB
    if who == "decode":
        shape, layers, weights = engine.QWEN_7B, 4, 15 * GIB
        settings = {"gpu_memory_utilization": engine.DECODE_UTILIZATION}
    else:
        with tempfile.TemporaryDirectory() as scratch:
            head_dim = GPU_HEAD_DIM if who.startswith("doctor") else None
            model = make_tiny_model(scratch, head_dim=head_dim)
        shape, layers, weights = model.config.to_dict(), 2, 0
        settings = tiny_engine(on_cpu=False) if who.startswith("doctor") else {}
    settings = {"gpu_memory_utilization": 0.92, "kv_cache_memory_bytes": None} | settings
    context, activations = GIB // 2, GIB
    size = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    a_token = 2 * 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * size
    share = int(total * settings["gpu_memory_utilization"])
    cache = settings["kv_cache_memory_bytes"] or share - weights - context - activations
    free = total - context - weights - cache
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    runner = SimpleNamespace(device=torch.device("cuda"), cache_config=SimpleNamespace(**settings))
    store = cache // a_token * DeviceStore.bytes_per_slot(layers, 1, len(FEATURES))
    if who.startswith("a tiny"):
        with pytest.raises(RuntimeError, match="lower gpu_memory_utilization by 0"):
            check_memory(runner, store)
    else:
        check_memory(runner, store)


class LLM:
    """Stands for vLLM's engine: notes what it is asked."""

    made: ClassVar[list] = []

    def __init__(self, model, **settings):
        self.settings, self.calls, self.asked = settings, [], []
        self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace())
        LLM.made.append(self)

    def sleep(self, level):
        self.calls.append(("sleep", level))

    def enqueue(self, prompts, params, use_tqdm):
        self.calls.append(("enqueue", len(prompts)))
        self.asked = params

    def wake_up(self, tags):
        self.calls.append(("wake_up", tags))

    def wait_for_completion(self, use_tqdm):
        token_ids = [[5] * one.max_tokens for one in self.asked]
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids)]) for ids in token_ids]


@pytest.fixture
def stand_in(monkeypatch):
    vllm = SimpleNamespace(LLM=LLM, SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    LLM.made.clear()
    return load("gpu_check/engine")


def test_engines_with_and_without_graphs_differ_in_nothing_else(stand_in):
    made = {
        mode: stand_in.make_engine("m", mode, 512, 16).settings
        for mode in ("graphs", "no_graphs", "off")
    }
    graphs = [made[mode].pop("compilation_config")["cudagraph_mode"] for mode in made]
    assert graphs == ["FULL_AND_PIECEWISE", "NONE", "FULL_AND_PIECEWISE"]
    assert made["graphs"] == made["no_graphs"] == made["off"]
    # It would drop torch.compile as well, and round differently.
    assert "enforce_eager" not in made["graphs"]


def test_all_requests_are_in_the_queue_before_the_first_step(stand_in, tmp_path):
    told = stand_in.traces("m", "off", 8, tmp_path / "off")
    (engine,) = LLM.made
    assert engine.calls == [("sleep", 0), ("enqueue", 15), ("wake_up", ["scheduling"])]
    assert engine.settings.items() >= tiny_engine(on_cpu=False).items()
    assert [len(ids) for ids in told["tokens"]] == [8 + 2 * i for i in range(15)]


@pytest.mark.parametrize("has_fp8", [False, True])
def test_fp8_keys_are_compared_where_they_are_served(has_fp8, monkeypatch):
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    kernel = load("gpu_check/kernel")
    monkeypatch.setattr(kernel, "device_reads_fp8", lambda: has_fp8)
    monkeypatch.setattr(kernel, "case", lambda *args: 0.0)
    monkeypatch.setattr(kernel, "tokens_case", lambda *args: 0.0)
    told = kernel.main("cuda", quick=False)
    assert ("float8_e4m3fn" in told["left_out"]) != has_fp8
    assert any("float8" in name for name in told["max_abs_error"]) == has_fp8


def test_the_comparison_of_kernels_passes_where_they_are_interpreted():
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    told = run(sys.executable, HERE / "kernel.py", "cpu", "quick", TRITON_INTERPRET="1")
    assert told.returncode == 0, told.stderr[-2000:]
    assert '"ok": true' in told.stdout
    assert "float8_e4m3fn 0.24 window 100" in told.stdout


def test_traces_are_compared_up_to_where_two_rollouts_part(tmp_path):
    check = load("gpu_check/check")
    g = np.random.default_rng(0)
    stats, tokens = g.random((4, 2, 1, 25)), g.random((2, 4))
    other = stats.copy()
    other[3] += 1  # computed after a token that differs
    np.savez(tmp_path / "graphs.npz", **{"0:stats": stats, "0:tokens": tokens})
    np.savez(tmp_path / "no_graphs.npz", **{"0:stats": other, "0:tokens": tokens})
    same, parted = {"tokens": [[5, 6, 7, 8]]}, {"tokens": [[5, 6, 9, 8]]}
    assert check._largest_error(tmp_path, same, parted) == 0
    assert check._largest_error(tmp_path, same, same) >= 0.9
    assert (check._same_tokens(same, same), check._same_tokens(same, parted)) == (1, 0)


def test_throughput_is_summed_up_as_ratios_to_an_engine_without_capture(monkeypatch):
    check = load("gpu_check/check")
    speed = {"off": 100.0, "layers_2": 98.0, "layers_4": 95.0}

    def child(script, what, model, mode, sizes):
        return {"tokens_per_second": {n: [speed[mode]] for n in sizes.split(",")}, "missing": 0}

    monkeypatch.setattr(check, "child", child)
    found = check.decode(None, quick=False)
    assert found["over_off"]["layers_2"] == {"1": 0.98, "64": 0.98, "256": 0.98}
    assert found["over_off"]["layers_4"]["256"] == 0.95
    assert found["ok"]
