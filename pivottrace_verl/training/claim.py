"""Whose RUN/train is: one training at a time moves a run's routes, and always the same one.

Contract: re-triage keeps in RUN/train what it asked for and at which step labels came into use.
That goes with one training's checkpoints: another one would be held back by arrivals that are not
its own, would not be told of prompts that were asked for before, and would ask for the same budget
again. So a training with re-triage holds the lock on RUN/train while it runs, and
RUN/train/owner.json names the folder of its checkpoints. `pivottrace train` holds the lock already
and hands its descriptor to the job, which then holds it even if the command is killed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from omegaconf import DictConfig

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.files import read_object, write_json_atomic
from pivottrace_verl.pool import RunDir

LOCK = "PIVOTTRACE_TRAIN_LOCK"
"""Set for the job that `pivottrace train` starts: the descriptor of the lock that it inherits."""

KEPT = ("owner.json", "arrivals.jsonl", "requests.jsonl", "requests")
"""What belongs to the training, besides its checkpoints."""


@contextmanager
def claimed(config: DictConfig) -> Iterator[None]:
    """Hold RUN/train for this training; nothing if it does not move routes.

    Raises PivotTraceError if another training holds it, or if it belongs to another: one with
    other checkpoints, or the same one begun anew.
    """
    if not config.pivottrace.retriage.enable:
        yield
        return
    run = RunDir.open(config.pivottrace.run)
    with nullcontext() if _inherited(run) else run.lock("train"):
        _own(run, config)
        yield


def _inherited(run: RunDir) -> bool:
    """Whether the process that started this one handed over the lock on RUN/train; it then names
    this one as its holder, which may outlive the other."""
    number = os.environ.pop(LOCK, None)
    if number is None:
        return False
    lock, path = int(number), run.path / "train" / ".lock"
    if not path.exists() or not os.path.samestat(os.fstat(lock), path.stat()):
        return False
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return True


def _own(run: RunDir, config: DictConfig) -> None:
    trainer, folder = config.trainer, run.path / "train"
    checkpoints = Path(trainer.default_local_dir)
    goes_on_from = checkpoints
    if trainer.resume_mode == "resume_path" and trainer.resume_from_path:
        goes_on_from = Path(trainer.resume_from_path).parent
    anew = trainer.resume_mode == "disable" and any(checkpoints.glob("global_step_*"))
    file = folder / "owner.json"
    owner = read_object(file).get("checkpoints") if file.exists() else None
    if owner is not None and (anew or owner != _name(run, goes_on_from)):
        raise PivotTraceError(
            f"{folder} holds the label requests of the training whose checkpoints are in {owner}, "
            + ("but this one begins anew" if anew else f"but this one's are in {goes_on_from}")
            + ": resume that one, give this one a copy of the run directory without its folder "
            f"train, or remove {', '.join(KEPT)} from {folder}."
        )
    if owner != _name(run, checkpoints):
        write_json_atomic(file, {"checkpoints": _name(run, checkpoints)})


def _name(run: RunDir, folder: Path) -> str:
    """Of a folder: from the run directory on, which may move, if it is in there."""
    path, home = folder.resolve(), run.path.resolve()
    return str(path.relative_to(home) if path.is_relative_to(home) else path)
