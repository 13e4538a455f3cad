"""`pivottrace calibrate`: heads chosen with a real engine, then captured by `score`; refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pivottrace_verl.pool import RunDir
from tests.bench.models import write_model

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).resolve().parents[2]


def pivottrace(*words):
    return subprocess.run(
        [sys.executable, "-m", "pivottrace_verl.cli", *(str(word) for word in words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A run directory after `calibrate`, and what the verb said."""
    folder = tmp_path_factory.mktemp("calibrate")
    write_model(folder / "model")
    rows = [
        {"prompt": [{"role": "user", "content": f"{2 * i + 9} +"}], "data_source": "s"}
        for i in range(4)
    ]
    (folder / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = pivottrace(
        "init", folder / "run", "--pool", folder / "pool.jsonl", "--model", folder / "model"
    )
    assert made.returncode == 0, made.stderr
    said = pivottrace("calibrate", folder / "run", "--rollouts", 6, "--max-tokens", 48, "--share",
                      0.5, "--max-sink", 1.0, "--max-prompt-tokens", 16, "--json")  # fmt: skip
    assert said.returncode == 0, said.stderr[-4000:]
    return folder / "run", json.loads(said.stdout)


def test_the_doctor_proves_the_capture_of_a_run_on_what_was_chosen_for_it(calibrated):
    run, said = calibrated
    found = pivottrace("doctor", run, "--json")
    assert found.returncode == 0, found.stderr[-4000:]
    proved = json.loads(found.stdout)["capture"]
    assert {name: proved[name] for name in ("layers", "heads")} == said["capture"]
    assert proved["rows"] == proved["tokens"] > 0
    assert proved["max_abs_error"] <= proved["bound"] == 1e-4


def test_score_captures_what_was_chosen_and_nothing_else(calibrated):
    run, said = calibrated
    assert said["settings"]["rollouts"] == 6
    assert [row["layer"] for row in said["measured"]] == [1, 2]
    assert sum(map(len, said["capture"]["heads"])) == 2
    refused = pivottrace("score", run, "--layers", "1")
    assert refused.returncode == 2
    assert "capture.json holds those that were calibrated" in refused.stderr
    done = pivottrace("score", run, "--rollouts", 2, "--max-tokens", 32, "--max-prompt-tokens", 16)
    assert done.returncode == 0, done.stderr[-4000:]
    opened = RunDir.open(run)
    captured = opened.manifest["settings"]["score"]["capture"]
    assert {name: captured[name] for name in ("layers", "heads")} == said["capture"]
    assert all(r["traced"] for row in opened.scores()["rollouts"].to_pylist() for r in row)
    late = pivottrace("calibrate", run)
    assert late.returncode == 2 and "scored already" in late.stderr
