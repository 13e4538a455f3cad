"""A training job that is killed and resumed ends as one that was not interrupted, in every order.

`pivottrace train` and all that it started get SIGKILL at a random step, twice; the same command
goes on. Compared are the prompts, labels and rewards of every step of every attempt, its metrics
(the routes' among them), the last checkpoint's weights and the state of all that steers. Capture,
votes and re-triage are on. The uninterrupted run also stands against one whose unbought labels are
nonsense.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch

from pivottrace_verl.pool import RunDir
from pivottrace_verl.training.data import training_tables, write_training_files
from tests.triaged_run import make_trainable_run
from tests.verl_jobs import (
    APART,
    REPRODUCIBLE,
    SETTINGS,
    comparable,
    read_lines,
    rollouts,
    weights,
)

pytestmark = pytest.mark.slow

STEPS, EVERY = 10, 2
ORDERS = ("mixed", "easy_to_hard", "uncertainty_first")
NONSENSE = "31337+31337"


@pytest.fixture(scope="module")
def triaged(policy: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_trainable_run(tmp_path_factory.mktemp("triaged") / "run", policy, data).path


@pytest.fixture(scope="module")
def uninterrupted(triaged: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A finished run in an order."""
    runs: dict[str, Path] = {}

    def of(order: str) -> Path:
        if order not in runs:
            run = tmp_path_factory.mktemp(order) / "run"
            shutil.copytree(triaged, run)
            finish(start(run, order), run)
            runs[order] = run
        return runs[order]

    return of


def start(run: Path, order: str, *overrides: str) -> subprocess.Popen[bytes]:
    """`pivottrace train` in a process of its own."""
    command = [
        *(sys.executable, "-m", "pivottrace_verl.cli", "train", run),
        *("--steps", STEPS, "--save-every", EVERY, "--batch-size", 8, "--rollouts", 4),
        *("--learning-rate", "1e-4", "--order", order, "--seed", 5, "--val-samples", 1),
        *SETTINGS,
        "pivottrace.request_seed=7",
        "pivottrace.retriage.enable=true",
        "pivottrace.retriage.every=3",
        # More than the plan's, so that labels are asked for.
        "pivottrace.retriage.budget=40",
        "trainer.val_before_train=False",
        f"trainer.rollout_data_dir={run.resolve()}/train/rollouts",
        *overrides,
    ]
    with (run / "command.log").open("ab") as output:
        return subprocess.Popen(
            [str(word) for word in command],
            env={**os.environ, **REPRODUCIBLE, "VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def finish(job: subprocess.Popen[bytes], run: Path) -> None:
    assert job.wait() == 0, (run / "command.log").read_text(errors="replace")[-3000:]


def kill_at(job: subprocess.Popen[bytes], run: Path, step: int) -> None:
    """SIGKILL to the command and all it started, somewhere in the step after that one."""
    log = run / "command.log"
    while logged(run) < step:
        assert job.poll() is None, log.read_text(errors="replace")[-3000:]
        time.sleep(0.05)
    # verl's thread that writes the step's rollouts takes a moment.
    time.sleep(random.uniform(0.3, 1.0))
    me = psutil.Process(job.pid)
    family = [me, *me.children(recursive=True)]
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=60)
    job.wait()


def logged(run: Path) -> int:
    """The last step that the latest attempt logged; 0 before its first."""
    files = sorted((run / "train").glob("metrics-*.jsonl"))
    lines = files[-1].read_bytes().split(b"\n")[:-1] if files else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def metrics(file: Path) -> dict[int, dict[str, Any]]:
    """Of each step, without what hangs on the clock or on how the engine batched."""
    lines = read_lines(file)
    return {
        entry["step"]: {k: v for k, v in values.items() if not k.startswith(APART)}
        for entry, values in zip(lines, comparable(lines), strict=True)
    }


def steering(run: Path) -> Any:
    """The curriculum, the weights, the guard and re-triage in the last checkpoint."""
    file = run / "train" / "checkpoints" / f"global_step_{STEPS}" / "data.pt"
    return plain(torch.load(file, weights_only=False)["_sampler_iter_state"])


def plain(value: Any) -> Any:
    """Arrays as lists, so that states can be compared."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value


def assert_same(found: Path, wanted: Path) -> None:
    assert rollouts(found / "train" / "rollouts") == rollouts(wanted / "train" / "rollouts")
    whole = metrics(wanted / "train" / "metrics.jsonl")
    assert sorted(whole) == list(range(1, STEPS + 1))
    for file in sorted((found / "train").glob("metrics-*.jsonl")):
        # Also of the steps that were taken twice.
        for step, values in metrics(file).items():
            assert values == whole[step], f"step {step} of {file}"
    checkpoints = (run / "train" / "checkpoints" for run in (found, wanted))
    assert len({weights(folder, STEPS) for folder in checkpoints}) == 1
    assert steering(found) == steering(wanted)


@pytest.mark.parametrize("order", ORDERS)
def test_a_run_killed_twice_ends_as_one_that_was_not(
    order: str, triaged: Path, uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(triaged, run)
    # The second attempt begins at the checkpoint before the first.
    for step in sorted(random.sample(range(1, STEPS - 1), 2)):
        kill_at(start(run, order), run, step)
    finish(start(run, order), run)
    assert len(list((run / "train").glob("metrics-*.jsonl"))) == 3
    whole = uninterrupted(order)
    steps = metrics(whole / "train" / "metrics.jsonl").values()
    assert any(step.get("pivottrace/self_train/rollouts", 0) > 0 for step in steps)
    assert any(step.get("pivottrace/annotate/rollouts", 0) > 0 for step in steps)
    assert any(step.get("pivottrace/retriage/asked", 0) > 0 for step in steps)
    assert_same(run, whole)


def test_unbought_labels_may_be_nonsense_without_changing_a_weight(
    triaged: Path, uninterrupted: Callable[[str], Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(triaged, run)
    poisoned = poison(run, tmp_path / "poisoned.parquet")
    finish(start(run, "mixed", f"data.train_files={poisoned}"), run)
    assert_same(run, uninterrupted("mixed"))
    for file in [*(run / "train").glob("metrics*.jsonl"), *(run / "train" / "rollouts").iterdir()]:
        assert NONSENSE not in file.read_text()


def poison(run: Path, file: Path) -> Path:
    """The run's training rows, each without a label given a false one."""
    opened = RunDir.open(run)
    write_training_files(opened, *training_tables(opened))
    table = pq.read_table(run / "train" / "train.parquet")
    rows = table.to_pylist()
    unbought = [row for row in rows if not row["extra_info"]["labeled"]]
    assert unbought
    for row in unbought:
        row["reward_model"]["ground_truth"] = NONSENSE
    pq.write_table(table.from_pylist(rows, schema=table.schema), file)
    return file
