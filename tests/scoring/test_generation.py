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
import json, sys, time
from pathlib import Path
import numpy as np
from pivottrace_verl.attention.channel import Receiver
from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.generation import Engine, Request

request = Request([*range(100, 164), 9], seed=3)
others = [Request([*range(100, 100 + n)], seed=n) for n in (40, 64, 70)]
# Room for one trace, in a receiver that does not say how much it wants.
Receiver.__init__.__defaults__ = (24 * 208,)
from pivottrace_verl.errors import PivotTraceError
size = dict(max_prompt_tokens=96, max_tokens=24)
try:
    Engine(Path(sys.argv[1]), **size, options={"no_such_option": 1}).__enter__()
except PivotTraceError as error:
    refused = str(error)
options = {"max_num_seqs": 7}
with Engine(Path(sys.argv[1]), **size, capture=CaptureConfig(), options=options) as e:
    max_num_seqs = e._llm.llm_engine.vllm_config.scheduler_config.max_num_seqs
    runs = [e.generate([request])[0]]
    busy = e.generate(others)
    runs += [e.generate([request])[0], e.generate([request])[0]]
    seconds = e.seconds_generating
    counts = dict(e.trace_counts)
    # From here on no trace arrives.
    e._receiver._deliver = lambda *arrived: None
    e._timeout = 2.0
    start = time.monotonic()
    lost = e.generate(others * 4)
    waited = time.monotonic() - start - (e.seconds_generating - seconds)
print(json.dumps({
    "counts": counts,
    "traced": [rollout.trace is not None for rollout in busy],
    "lost": [rollout.trace is None and len(rollout.token_ids) for rollout in lost],
    "waited": waited,
    "tokens": [run.token_ids for run in runs],
    "same": [bool(np.array_equal(getattr(run.trace, name), getattr(runs[0].trace, name)))
             for run in runs[1:] for name in ("stats", "token_entropy", "self_certainty")],
    "order": [len(rollout.token_ids) for rollout in busy],
    "seconds": seconds,
    "refused": refused,
    "max_num_seqs": max_num_seqs,
}))
"""


pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    model = tmp_path_factory.mktemp("generation") / "model"
    write_model(model)
    child = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(model)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    return json.loads(child.stdout.splitlines()[-1])


def test_the_same_request_gives_the_same_bits_whatever_came_before(found):
    assert found["tokens"][0] == found["tokens"][1] == found["tokens"][2]
    assert found["same"] == [True] * 6
    assert len(found["order"]) == 3
    assert found["seconds"] > 0


def test_engine_options_reach_vllm_and_unknown_ones_are_told(found):
    assert found["max_num_seqs"] == 7
    assert "vLLM does not start with no_such_option=1 (" in found["refused"]


def test_no_trace_is_dropped_however_many_wait_to_be_collected(found):
    assert found["traced"] == [True] * 3
    assert found["counts"] == {
        "received": 6, "missing": 0, "lost": 0, "late": 0, "dropped": 0, "rejected": 0
    }  # fmt: skip


def test_traces_that_do_not_come_cost_one_wait_a_call_not_one_each(found):
    assert len(found["lost"]) == 12 and all(found["lost"])
    assert 2.0 <= found["waited"] < 8.0
