"""The train stage: a run directory becomes one verl job, started, watched and resumed.

Contract: everything the job needs is written as Hydra overrides on
`pivottrace_verl.training.main_ppo`, the user's own overrides last, so they win. The job runs in a
process of its own with its output in RUN/train/train.log; it resumes from verl's last checkpoint.
verl's file logger starts its file anew with each attempt, so each attempt has its own and
RUN/train/metrics.jsonl is their union, later attempts winning.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pivottrace_verl.curriculum import ORDERS
from pivottrace_verl.errors import PivotTraceError, last_error
from pivottrace_verl.files import read_object, write_bytes_atomic, write_json_atomic
from pivottrace_verl.plugin import cpu_platform_requested
from pivottrace_verl.pool import RunDir
from pivottrace_verl.training.claim import LOCK
from pivottrace_verl.training.data import training_tables, write_training_files

DIE_WITH_PARENT = "PIVOTTRACE_DIE_WITH_PARENT"
"""Set for the job: a killed command must not leave a verl job behind that nobody watches."""

ENDING_S = 10.0
"""Seconds in which a job ends whose command was killed."""

StepSeen = Callable[[int, dict[str, float]], None]
"""Called with (step, verl's metrics of it) as the job logs them; step 0 is the first validation."""


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the train stage that have no better home in verl's own configuration."""

    steps: int = 100
    batch_size: int = 32
    rollouts: int = 8
    learning_rate: float = 1e-6
    seed: int = 0
    order: str = "mixed"
    self_train_weight: float = 1.0
    min_agreement: float = 0.0
    val_samples: int = 4
    save_every: int = 0
    """Steps between checkpoints; 0: only at the end."""
    n_gpus_per_node: int = 1
    nnodes: int = 1


def overrides(run: RunDir, config: TrainConfig, attempt_file: Path) -> list[str]:
    """The Hydra overrides of this run's verl job."""
    score = run.manifest["settings"]["score"]
    detector, capture = run.manifest.get("detector", {}), score["capture"]
    mode = score["score"].get("capture", "on")
    folder = run.path.resolve() / "train"
    items: dict[str, Any] = {
        "data.train_files": folder / "train.parquet",
        "data.val_files": folder / "val.parquet",
        "data.train_batch_size": config.batch_size,
        "data.max_prompt_length": score["score"]["max_prompt_tokens"],
        "data.max_response_length": score["score"]["max_tokens"],
        "actor_rollout_ref.model.path": Path(run.manifest["model"]["path"]).resolve(),
        "actor_rollout_ref.actor.optim.lr": config.learning_rate,
        "actor_rollout_ref.actor.ppo_mini_batch_size": config.batch_size,
        "actor_rollout_ref.actor.use_kl_loss": False,
        "actor_rollout_ref.actor.checkpoint.save_contents": "[model,optimizer,extra,hf_model]",
        "actor_rollout_ref.actor.checkpoint.load_contents": "[model,optimizer,extra]",
        "actor_rollout_ref.rollout.n": config.rollouts,
        "actor_rollout_ref.rollout.temperature": score["score"]["temperature"],
        "actor_rollout_ref.rollout.calculate_log_probs": True,
        "actor_rollout_ref.rollout.val_kwargs.n": config.val_samples,
        "actor_rollout_ref.rollout.val_kwargs.do_sample": True,
        "actor_rollout_ref.rollout.val_kwargs.temperature": 1.0,
        "trainer.total_training_steps": config.steps,
        "trainer.total_epochs": 1_000_000,
        "trainer.save_freq": config.save_every or config.steps,
        "trainer.test_freq": config.steps,
        "trainer.logger": "[console,file]",
        "trainer.project_name": "pivottrace",
        "trainer.experiment_name": run.path.name,
        "trainer.default_local_dir": folder / "checkpoints",
        # verl takes the old weights away before it says that the new checkpoint is there: with 1, a
        # job killed between the two could not be resumed.
        "trainer.max_actor_ckpt_to_keep": 2,
        "trainer.resume_mode": "auto",
        "trainer.n_gpus_per_node": config.n_gpus_per_node,
        "trainer.nnodes": config.nnodes,
        "pivottrace.run": run.path.resolve(),
        "pivottrace.answers": run.manifest["answers"]["kind"],
        "pivottrace.curriculum.order": config.order,
        "pivottrace.curriculum.seed": config.seed,
        "pivottrace.vote.min_agreement": config.min_agreement,
        "pivottrace.weights.self_train": config.self_train_weight,
        "+ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH": attempt_file,
        **{f"pivottrace.detector.{name}": value for name, value in detector.items()},
        **{f"pivottrace.capture.{name}": value for name, value in capture.items()},
        # What could not be captured while scoring cannot be while training.
        "pivottrace.capture.enable": mode == "on",
    }
    return [f"{name}={_hydra(value)}" for name, value in items.items()]


def _hydra(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Path):
        return json.dumps(str(value))
    if isinstance(value, list | tuple | dict):
        return json.dumps(value).replace(" ", "")
    return str(value)


def train(
    run: RunDir, config: TrainConfig, extra: Sequence[str], on_step: StepSeen
) -> dict[str, Any]:
    """Run the job to its end and return what `train/done.json` holds.

    The whole run directory is held only while its training files are made; then only RUN/train
    is, so that labels can be imported while the job runs. Raises PivotTraceError if the run was
    trained from another plan or with other settings, or if the job ends without reaching the last
    step; its log is named.
    """
    if config.order not in ORDERS:
        raise PivotTraceError(
            f"The curriculum's order is '{config.order}', but must be one of {', '.join(ORDERS)}."
        )
    with ExitStack() as training:
        with run.lock():
            prepared = _prepare(run, config, extra, training)
        if prepared is None:
            return read_object(run.path / "train" / "done.json")
        return _run_job(run, config, extra, prepared, on_step)


@dataclass(frozen=True)
class _Prepared:
    """What a job starts from."""

    train_rows: int
    val_rows: int
    lock: int
    """Descriptor of the lock on RUN/train."""


def _prepare(
    run: RunDir, config: TrainConfig, extra: Sequence[str], training: ExitStack
) -> _Prepared | None:
    """Lock RUN/train and write the training files there; None if the job is done."""
    folder = run.path / "train"
    asked = {
        "plan": run.stage_fingerprint("plan"),
        "config": dataclasses.asdict(config),
        "overrides": list(extra),
    }
    started = folder / "started.json"
    if started.exists():
        before = read_object(started)
        if before != asked:
            changed = ", ".join(
                f"{name}: {before.get(name)!r} then, {asked[name]!r} now"
                for name in asked
                if before.get(name) != asked[name]
            )
            raise PivotTraceError(
                f"{folder} holds a training run of another plan or other settings ({changed}): "
                "repeat those, or remove the folder to train anew."
            )
    if (folder / "done.json").exists():
        return None
    run.model_path()
    # Refusals first: the lock makes the folder.
    train_rows, val_rows = training_tables(run, config.batch_size)
    # The job of a command that was killed holds it until it has ended, too.
    lock = training.enter_context(run.lock("train", wait=ENDING_S))
    write_training_files(run, train_rows, val_rows)
    write_json_atomic(started, asked)
    return _Prepared(train_rows.num_rows, val_rows.num_rows, lock)


def _run_job(
    run: RunDir,
    config: TrainConfig,
    extra: Sequence[str],
    prepared: _Prepared,
    on_step: StepSeen,
) -> dict[str, Any]:
    """One attempt at the job, from verl's latest checkpoint on."""
    folder = run.path / "train"
    attempt = len(list(folder.glob("metrics-*.jsonl")))
    attempt_file = folder.resolve() / f"metrics-{attempt:03d}.jsonl"
    command = [sys.executable, "-m", "pivottrace_verl.training.main_ppo"]
    command += overrides(run, config, attempt_file)
    environment = {**os.environ, DIE_WITH_PARENT: "1", LOCK: str(prepared.lock)}
    if cpu_platform_requested():
        from pivottrace_verl.cpu.settings import cpu_env, cpu_overrides

        command += cpu_overrides()
        command += ["pivottrace.poll_interval_s=0.1"]
        environment |= cpu_env()
    command += [f"hydra.run.dir={json.dumps(str(folder.resolve() / 'hydra'))}", *extra]
    log = folder / "train.log"
    with log.open("ab") as output:
        start = output.tell()
        job = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
            pass_fds=(prepared.lock,),
        )
        try:
            _watch(job, attempt_file, on_step)
        finally:
            if job.poll() is None:
                job.terminate()
                job.wait(timeout=60)
    merge_metrics(folder)
    checkpoint = folder / "checkpoints" / f"global_step_{config.steps}" / "actor" / "huggingface"
    if job.returncode != 0 or not checkpoint.exists():
        error = last_error(tail(log, start))
        raise PivotTraceError(
            f"the verl job ended with status {job.returncode} before step {config.steps}"
            + (f" ({error})" if error else "")
            + f"; its output is in {log}, and the same command resumes from the last checkpoint."
        )
    result = {
        "steps": config.steps,
        "checkpoint": str(checkpoint.relative_to(run.path)),
        "train_rows": prepared.train_rows,
        "val_rows": prepared.val_rows,
        "attempts": attempt + 1,
    }
    write_json_atomic(folder / "done.json", result)
    return result


def _watch(job: subprocess.Popen[bytes], file: Path, on_step: StepSeen) -> None:
    """Report each line of verl's metrics file until the job ends."""
    position = 0
    while True:
        ended = job.poll() is not None
        if file.exists():
            with file.open("rb") as stream:
                stream.seek(position)
                for line in stream:
                    if not line.endswith(b"\n"):
                        break
                    position += len(line)
                    entry = json.loads(line)
                    on_step(entry["step"], entry["data"])
        if ended:
            return
        time.sleep(0.5)


def tail(log: Path, start: int) -> str:
    """The last MiB of a job's output, from byte `start` on."""
    with log.open("rb") as stream:
        stream.seek(max(start, log.stat().st_size - (1 << 20)))
        return stream.read().decode(errors="replace")


def merge_metrics(folder: Path) -> list[dict[str, Any]]:
    """Join the attempts' metrics by step into metrics.jsonl and return them in order."""
    steps: dict[int, dict[str, Any]] = {}
    for file in sorted(folder.glob("metrics-*.jsonl")):
        for line in file.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                entry = json.loads(line)
                steps[entry["step"]] = entry
    merged = [steps[step] for step in sorted(steps)]
    lines = "".join(json.dumps(entry) + "\n" for entry in merged)
    write_bytes_atomic(folder / "metrics.jsonl", lines.encode())
    return merged
