"""A small verl job with PivotTrace on: rows of both routes, two cores, a minute or two each."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from pivottrace_verl.cpu.settings import cpu_env, cpu_overrides

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "quickstart"
N_PROMPTS = 64
LIMIT_S = 900.0
"""A job that takes longer hangs."""


def prepare(path: Path) -> None:
    """A policy, and rows of verl's whose odd ones have no label that anybody bought."""
    for command in (
        ("make_policy.py", "--out", path / "policy", "--small"),
        ("make_pool.py", "--out", path / "data", "--n-pool", N_PROMPTS, "--n-val", 8),
    ):
        words = [str(word) for word in command[1:]]
        subprocess.run([sys.executable, RECIPE / command[0], *words], check=True)
    labels = {}
    for line in (path / "data" / "answers.jsonl").read_text().splitlines():
        labels[json.loads(line)["pt_id"]] = json.loads(line)["label"]
    pool = [json.loads(line) for line in (path / "data" / "pool.jsonl").read_text().splitlines()]
    rows = [
        {
            "prompt": row["prompt"],
            "data_source": row["data_source"],
            "reward_model": {"style": "rule", "ground_truth": label if i % 2 == 0 else None},
            "extra_info": {
                "index": i,
                "pt_id": pt_id,
                "labeled": i % 2 == 0,
                "route": "self_train" if i % 2 else "annotate",
                "uncertainty": i / N_PROMPTS,
            },
        }
        for i, (row, (pt_id, label)) in enumerate(zip(pool, labels.items(), strict=True))
    ]
    pq.write_table(pa.Table.from_pylist(rows), path / "rows.parquet")


class Job:
    """One attempt, in the folder NAME of `work`."""

    def __init__(self, work: Path, name: str, *overrides: str) -> None:
        self.folder = work / name
        self.folder.mkdir()
        extra = {"VERL_FILE_LOGGER_PATH": str(self.folder / "metrics.jsonl")}
        words = [
            *cpu_overrides(env={**extra, "PYTHONPATH": str(ROOT)}),
            f"actor_rollout_ref.model.path={work / 'policy'}",
            f"data.train_files={work / 'rows.parquet'}",
            f"data.val_files={work / 'rows.parquet'}",
            "data.train_batch_size=8",
            "data.max_prompt_length=64",
            "data.max_response_length=128",
            "actor_rollout_ref.actor.ppo_mini_batch_size=8",
            "actor_rollout_ref.actor.optim.lr=1e-4",
            "actor_rollout_ref.actor.use_kl_loss=False",
            "actor_rollout_ref.rollout.n=4",
            "actor_rollout_ref.rollout.calculate_log_probs=True",
            "pivottrace.answers=expression",
            "pivottrace.detector.tau=0.01",
            "pivottrace.poll_interval_s=0.1",
            "trainer.val_before_train=False",
            "trainer.test_freq=-1",
            "trainer.save_freq=-1",
            "trainer.resume_mode=disable",
            "trainer.logger=[console,file]",
            f"trainer.default_local_dir={self.folder / 'checkpoints'}",
            f"trainer.rollout_data_dir={self.folder / 'rollouts'}",
            f"hydra.run.dir={self.folder / 'hydra'}",
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
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line)["data"] for line in lines if line.endswith("\n")]

    def prompts(self, step: int) -> set[str]:
        """Those that the step trained on."""
        lines = (self.folder / "rollouts" / f"{step}.jsonl").read_text().splitlines()
        return {json.loads(line)["input"] for line in lines}

    def kill(self, name: str) -> int:
        """SIGKILL the first of the job's processes whose command holds `name`."""
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
