"""Scoring that is killed and run again ends with the same bytes as scoring that is left alone.

Real engines on a tiny random model, in processes of their own. The prompts share a long beginning,
which the engine would keep between parts, and hidden states are read as well.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pivottrace_verl.estimators import ESTIMATORS
from pivottrace_verl.pool import RunDir
from pivottrace_verl.schemas import SCORE_SCHEMA
from pivottrace_verl.scoring import TIMINGS
from pivottrace_verl.traces import FEATURE_NAMES
from tests.bench.models import write_model

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parents[2]
PROMPTS, PARTS, ROLLOUTS = 15, 3, 4
BEGINNING = " ".join(f"w{i}" for i in range(100, 240, 2))
SCORE = (
    "--rollouts", ROLLOUTS, "--max-prompt-tokens", 96, "--max-tokens", 96,
    "--part-size", PROMPTS // PARTS, "--hidden-states",
)  # fmt: skip


def start(*words):
    command = [sys.executable, "-m", "pivottrace_verl.cli", *(str(word) for word in words)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def pivottrace(*words):
    child = start(*words)
    said, _ = child.communicate(timeout=600)
    assert child.returncode == 0, said[-4000:]
    return said


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    write_model(folder / "model")
    rows = [
        {"prompt": [{"role": "user", "content": f"{BEGINNING} {2 * i + 9} +"}], "data_source": "s"}
        for i in range(PROMPTS)
    ]
    (folder / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("whole", "killed"):
        pivottrace("init", folder / name, "--pool", folder / "pool.jsonl", "--model",
                   folder / "model")  # fmt: skip
    pivottrace("score", folder / "whole", *SCORE)
    return folder


@pytest.fixture(scope="module")
def resumed(work):
    """The other run: killed when its first part is there, then run again."""
    child = start("score", work / "killed", *SCORE)
    first = work / "killed" / "scores" / "part-00000.parquet"
    end = time.monotonic() + 600
    while not first.exists() and child.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    os.killpg(child.pid, signal.SIGKILL)
    said, _ = child.communicate()
    assert first.exists(), said[-4000:]
    assert not (work / "killed" / "scores.parquet").exists(), "it was done before it was killed"
    assert len(RunDir.open(work / "killed").finished_parts()) < PARTS
    pivottrace("score", work / "killed", *SCORE)
    return work / "killed"


def test_a_killed_and_resumed_run_has_the_bytes_of_an_uninterrupted_one(work, resumed):
    whole = work / "whole"
    names = [f"scores/part-{i:05d}.parquet" for i in range(PARTS)]
    for name in (*names, "scores.parquet", "traces/part-00000.safetensors",
                 "traces/part-00000.json"):  # fmt: skip
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name


def test_the_manifests_are_the_same_but_for_the_timings(work, resumed):
    manifests = [
        json.loads((run / "manifest.json").read_text()) for run in (work / "whole", resumed)
    ]
    for manifest in manifests:
        seconds = manifest.pop("timings")
        assert set(TIMINGS) < set(seconds)
        assert all(seconds[name] > 0 for name in TIMINGS)
    assert manifests[0] == manifests[1]
    assert {"detector", "variants", "forks"} <= set(manifests[0])


def test_every_estimator_and_every_feature_is_known_of_every_prompt(work):
    table = RunDir.open(work / "whole").scores()
    assert table.schema.names == SCORE_SCHEMA.names
    rows = table.to_pylist()
    assert len(rows) == PROMPTS
    for row in rows:
        assert all(rollout["traced"] for rollout in row["rollouts"])
        for name in [f"uncertainty/{n}" for n in ESTIMATORS] + [
            f"features/{n}" for n in FEATURE_NAMES
        ]:
            assert row[name] is not None and math.isfinite(row[name]), name
        assert row["timed_out"] == 0
        assert row["uncertainty/nll"] == pytest.approx(-row["logprob_mean"])
        certainties = [rollout["self_certainty"] for rollout in row["rollouts"]]
        assert row["uncertainty/self_certainty"] == pytest.approx(-sum(certainties) / ROLLOUTS)
        assert min(certainties) > 0
    assert len({row["uncertainty/coe"] for row in rows}) == PROMPTS


def test_scoring_a_scored_run_again_changes_nothing(work):
    before = (work / "whole" / "scores.parquet").stat()
    manifest = json.loads((work / "whole" / "manifest.json").read_text())
    pivottrace("score", work / "whole", *SCORE)
    after = json.loads((work / "whole" / "manifest.json").read_text())
    assert {n: after["timings"][n] for n in TIMINGS} == {n: manifest["timings"][n] for n in TIMINGS}
    assert (work / "whole" / "scores.parquet").stat().st_size == before.st_size
