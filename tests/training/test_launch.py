"""What the train stage says when its verl job fails, and what it hands to the job."""

import sys
from pathlib import Path

import pytest

from pivottrace_verl.errors import MAX_ERROR, PivotTraceError, last_error
from pivottrace_verl.training.launch import TrainConfig, tail, train
from tests.triaged_run import buy, make_run, note_scoring, trained


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("error: data.shuffle must be false.", "error: data.shuffle must be false."),
        ('AssertionError("[actor] Please set one.")', 'AssertionError("[actor] Please set one.")'),
        ("  ray.exceptions.RayActorError: gone", "ray.exceptions.RayActorError: gone"),
        ("(TaskRunner pid=31) ValueError: bad", "(TaskRunner pid=31) ValueError: bad"),
    ],
)
def test_the_last_error_of_a_job_is_found_in_its_output(line: str, told: str) -> None:
    output = f"step:1 - loss:2\nKeyError: earlier\n{line}\nfull_key: actor\n\n"
    assert last_error(output) == told


def test_an_error_of_an_earlier_attempt_is_not_this_attempts(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text("error: of the attempt before.\n")
    start = log.stat().st_size
    with log.open("a") as stream:
        stream.write("no ErrorWord: here, only output\n")
    assert last_error(tail(log, start)) == ""


def test_a_long_error_is_cut_and_bytes_that_are_no_text_do_no_harm(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_bytes(b"\xff\xfe\nValueError: " + b"x" * 10_000 + b"\n")
    assert len(last_error(tail(log, 0))) == MAX_ERROR


def test_the_job_inherits_the_lock_on_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path)
    note_scoring(run)
    buy(run, dict.fromkeys(set(trained(run)) - set(run.ledger().labels()), "1"), "annotate")
    job = tmp_path / "job"
    job.write_text("#!/bin/sh\nreadlink /proc/$$/fd/$PIVOTTRACE_TRAIN_LOCK\nexit 1\n")
    job.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(job))
    with pytest.raises(PivotTraceError, match="the verl job ended with status 1"):
        train(run, TrainConfig(batch_size=2), [], lambda step, metrics: None)
    said = (run.path / "train" / "train.log").read_text()
    assert said == f"{(run.path / 'train' / '.lock').resolve()}\n"
    with run.lock("train"):
        pass
