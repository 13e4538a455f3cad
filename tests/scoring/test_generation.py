"""What an engine generates depends on the requests at hand, not on those it served before."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.models import write_model

ROOT = Path(__file__).resolve().parents[2]
# A prompt of two blocks and a token: kept from before, that token would be computed on its own.
SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np
from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.generation import Engine, Request

request = Request([*range(100, 164), 9], seed=3)
others = [Request([*range(100, 100 + n)], seed=n) for n in (40, 64, 70)]
with Engine(Path(sys.argv[1]), max_prompt_tokens=96, max_tokens=24, capture=CaptureConfig()) as e:
    runs = [e.generate([request])[0]]
    busy = e.generate(others)
    runs += [e.generate([request])[0], e.generate([request])[0]]
    seconds = e.seconds_generating
print(json.dumps({
    "tokens": [run.token_ids for run in runs],
    "same": [bool(np.array_equal(getattr(run.trace, name), getattr(runs[0].trace, name)))
             for run in runs[1:] for name in ("stats", "token_entropy", "self_certainty")],
    "order": [len(rollout.token_ids) for rollout in busy],
    "seconds": seconds,
}))
"""


@pytest.mark.vllm
def test_the_same_request_gives_the_same_bits_whatever_came_before(tmp_path):
    write_model(tmp_path / "model")
    child = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "model")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    found = json.loads(child.stdout.splitlines()[-1])
    assert found["tokens"][0] == found["tokens"][1] == found["tokens"][2]
    assert found["same"] == [True] * 6
    assert len(found["order"]) == 3
    assert found["seconds"] > 0
