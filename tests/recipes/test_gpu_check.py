"""The check for machines with a GPU: it cannot run here, but it starts, refuses and compares."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

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
    np.savez(tmp_path / "eager.npz", **{"0:stats": other, "0:tokens": tokens})
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
