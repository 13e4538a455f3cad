"""Runs of `pivottrace score` on a tiny random model, in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.bench.models import write_model

ROOT = Path(__file__).resolve().parents[2]


def start(*words: Any, **environment: str) -> subprocess.Popen[str]:
    """The command line with `words`, its output in a pipe."""
    command = [sys.executable, "-m", "pivottrace_verl.cli", *(str(word) for word in words)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def pivottrace(*words: Any, status: int = 0, **environment: str) -> str:
    """What the command said; it must end with `status`."""
    child = start(*words, **environment)
    said, _ = child.communicate(timeout=600)
    assert child.returncode == status, said[-4000:]
    return said


def init_runs(folder: Path, names: tuple[str, ...], prompts: list[str]) -> None:
    """The model, the pool and run directories of these names."""
    write_model(folder / "model")
    rows = [{"prompt": [{"role": "user", "content": p}], "data_source": "s"} for p in prompts]
    (folder / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in names:
        pivottrace("init", folder / name, "--pool", folder / "pool.jsonl", "--model",
                   folder / "model")  # fmt: skip


def kill_after_first_part(run: Path, *options: Any) -> None:
    """Score, and kill it when the first part is there."""
    child = start("score", run, *options)
    first = run / "scores" / "part-00000.parquet"
    end = time.monotonic() + 600
    while not first.exists() and child.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    os.killpg(child.pid, signal.SIGKILL)
    said, _ = child.communicate()
    assert first.exists(), said[-4000:]
    assert not (run / "scores.parquet").exists(), "it was done before it was killed"
