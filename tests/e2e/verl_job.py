"""A small verl job with PivotTrace on: rows of both routes, two cores, a minute or two each."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from pivottrace_verl.cpu.settings import cpu_env, cpu_overrides
from tests.verl_jobs import (
    ROOT,
    job_overrides,
    labelled_rows,
    make_policy,
    make_pool,
    read_lines,
    write_rows,
)

N_PROMPTS = 64
LIMIT_S = 900.0
"""A job that takes longer hangs."""


def prepare(path: Path) -> None:
    """A policy, and rows of verl's whose odd ones have no label that anybody bought."""
    make_policy(path / "policy", steps=None)
    rows = labelled_rows(make_pool(path / "data", N_PROMPTS))
    for i, row in enumerate(rows):
        row["extra_info"]["uncertainty"] = i / N_PROMPTS
        if i % 2:
            row["extra_info"] |= {"labeled": False, "route": "self_train"}
            row["reward_model"]["ground_truth"] = None
    write_rows(path / "rows.parquet", rows)


class Job:
    """One attempt, in the folder NAME of `work`."""

    def __init__(self, work: Path, name: str, *overrides: str) -> None:
        self.folder = work / name
        self.folder.mkdir()
        extra = {"VERL_FILE_LOGGER_PATH": str(self.folder / "metrics.jsonl")}
        words = [
            *cpu_overrides(env={**extra, "PYTHONPATH": str(ROOT)}),
            *job_overrides(self.folder, work / "policy", work / "rows.parquet"),
            "pivottrace.answers=expression",
            "pivottrace.detector.tau=0.01",
            "pivottrace.poll_interval_s=0.1",
            "trainer.save_freq=-1",
            *overrides,
        ]
        self.log = self.folder / "log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pivottrace_verl.training.main_ppo", *words],
                env={**os.environ, **cpu_env(), **extra, "PYTHONPATH": str(ROOT)},
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
            )

    def metrics(self) -> list[dict[str, Any]]:
        """Of each step that is complete."""
        file = self.folder / "metrics.jsonl"
        return [entry["data"] for entry in read_lines(file)] if file.exists() else []

    def prompts(self, step: int) -> set[str]:
        """Those that the step trained on."""
        return {row["input"] for row in read_lines(self.folder / "rollouts" / f"{step}.jsonl")}

    def kill(self, name: str) -> int:
        """SIGKILL the first of the job's processes whose command holds `name`, or which Ray calls
        so where it prints: a title may be cut or changed."""
        called = re.search(rf"\({name} pid=(\d+)\)", self.words())
        if called:
            os.kill(int(called[1]), signal.SIGKILL)
            return int(called[1])
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if name in " ".join(process.cmdline()):
                process.send_signal(signal.SIGKILL)
                return process.pid
        raise AssertionError(f"no process of the job is a {name}")

    def wait(self, until: Callable[[], bool] | None = None) -> int | None:
        """Wait for the end, or for `until`; the job's status, None while it runs. A job that takes
        too long is ended, and fails the test."""
        deadline = time.monotonic() + LIMIT_S
        while self.process.poll() is None and not (until and until()):
            if time.monotonic() > deadline:
                self.stop()
                raise AssertionError(f"the job hangs:\n{self.words()[-3000:]}")
            time.sleep(0.2)
        return self.process.poll()

    def words(self) -> str:
        """What it printed."""
        return self.log.read_text(errors="replace")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self.process.kill()
