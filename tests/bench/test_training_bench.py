"""The benchmark of training's own work still runs."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_benchmark_measures_a_small_pool(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    words = ["--out", str(out), "--prompts", "2000", "--steps", "3"]
    command = [sys.executable, "-m", "tests.bench.training", *words]
    job = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert job.returncode == 0, job.stdout + job.stderr
    found = json.loads(out.read_text())
    assert found["prompts"] == 2000 and found["peak_gib"] > 0
    assert found["steering"]["step_with_its_share_of_retriage"]["cpu_ms"] > 0
    assert found["vote"]["exact"]["ours_ms"] > 0
