"""The benchmark of triage still runs and measures the real command."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_benchmark_measures_a_small_pool_and_says_on_what_machine(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    words = ["--out", str(out), "--sizes", "400", "--repeat", "1"]
    command = [sys.executable, "-m", "tests.bench.triage", *words]
    job = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert job.returncode == 0, job.stdout + job.stderr
    found = json.loads(out.read_text())
    (row,) = found["sizes"]
    assert row["prompts"] == 400
    assert row["cpu_seconds"] > 0 and row["seconds"] > 0 and row["peak_gib"] > 0
    assert found["machine"]["cores"] and found["versions"]["pyarrow"]
