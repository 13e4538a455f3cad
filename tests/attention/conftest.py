"""Runs of real engines, in processes of their own, shared by the tests of a session."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny models on busy machines: more threads only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def interpreted():
    """Triton kernels run in the interpreter while a module's tests do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield


@pytest.fixture(scope="session")
def run_engines(tmp_path_factory):
    """Run one of the scripts beside this file; returns what it wrote."""

    def run(script, *arguments, **environment):
        from pivottrace_verl.attention.channel import Trace
        from pivottrace_verl.attention.selftest import ENVIRONMENT

        scratch = tmp_path_factory.mktemp(Path(script).stem)
        child = subprocess.run(
            [sys.executable, str(HERE / script), str(scratch), *arguments],
            env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert child.returncode == 0, child.stderr[-4000:]
        with np.load(scratch / "traces.npz") as arrays:
            found = dict(arrays)
        keys = [name.removesuffix(":stats") for name in found if name.endswith(":stats")]
        return SimpleNamespace(
            **json.loads((scratch / "runs.json").read_text()),
            traces={
                key: Trace(key, found[f"{key}:stats"], *found[f"{key}:tokens"]) for key in keys
            },
            scratch=scratch,
        )

    return run
