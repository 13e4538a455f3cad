"""What is refused of a training that re-triages: another measure than its plan's, and a run
directory that belongs to another training."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.files import write_json_atomic
from pivottrace_verl.observed import MEASURED, observed
from pivottrace_verl.pool import RunDir
from tests.step_records import record
from tests.triaged_run import make_run, note_scoring

checks = pytest.importorskip("pivottrace_verl.training.checks", reason="verl is not installed")

from pivottrace_verl.training import main_ppo  # noqa: E402
from pivottrace_verl.training.claim import LOCK, claimed  # noqa: E402


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = make_run(tmp_path)
    note_scoring(made)
    return made


def planned(run: RunDir, estimator: str) -> None:
    """Say that the plan was made by this estimator."""
    info = json.loads((run.path / "triage.json").read_text())
    write_json_atomic(run.path / "triage.json", {**info, "estimator": estimator})


def config(run: RunDir, *words: str) -> Any:
    """Of a training with re-triage, by the detector in the run's manifest."""
    with initialize_config_module("pivottrace_verl.training.config", version_base=None):
        return compose(
            "pivottrace_trainer",
            overrides=[
                "actor_rollout_ref.model.path=/model",
                "actor_rollout_ref.actor.use_dynamic_bsz=true",
                "actor_rollout_ref.rollout.calculate_log_probs=true",
                "pivottrace.detector.tau=0.05",
                f"pivottrace.run={run.path}",
                "pivottrace.retriage.enable=true",
                *words,
            ],
        )


NO_CAPTURE = "pivottrace.capture.enable=false"
NO_LOGPROBS = "actor_rollout_ref.rollout.calculate_log_probs=false"


@pytest.mark.parametrize(
    ("estimator", "word", "said"),
    [
        ("nll", NO_LOGPROBS, r"by nll; .* only with actor_rollout_ref\.rollout\.calculate_log_pr"),
        ("entropy", NO_CAPTURE, r"by entropy; .* only with pivottrace\.capture\.enable=true"),
        ("pivot_density", NO_CAPTURE, "by pivot_density; .* only with pivottrace.capture.enable"),
        ("pivot_count", NO_CAPTURE, "by pivot_count; .* only with pivottrace.capture.enable=true"),
    ],
)
def test_retriage_by_what_training_does_not_measure_is_refused(
    run: RunDir, estimator: str, word: str, said: str
) -> None:
    planned(run, estimator)
    checks.check(config(run))
    with pytest.raises(PivotTraceError, match=said):
        checks.check(config(run, word))
    checks.check(config(run, word, "pivottrace.retriage.enable=false"))


def test_every_estimator_that_needs_a_setting_to_be_measured_is_checked() -> None:
    blind = {**record("p"), "traced": False, "logprob": None}
    (group,) = observed([("g", blind)])
    assert set(MEASURED) - set(group.values) == {*checks.OF_TRACES, *checks.OF_LOGPROBS}


def test_estimators_that_need_neither_capture_nor_log_probabilities_take_any(run: RunDir) -> None:
    for estimator in ("consistency", "length"):
        planned(run, estimator)
        checks.check(config(run, NO_CAPTURE, NO_LOGPROBS, "pivottrace.detector.tau=0.1"))


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("pivottrace.detector.tau=0.1", r"detector\.tau=0\.05, but this training has 0\.1:"),
        ("pivottrace.detector.signal=sink_mass", r"signal=response_long_mass, but this .* sink_ma"),
        ("pivottrace.capture.layers=[3,5]", r"layers=None, but this training has \(3, 5\):"),
        ("pivottrace.capture.window=16", r"capture\.window=32, but this training has 16:"),
    ],
)
def test_pivots_of_another_detector_or_capture_are_not_mixed_with_the_plans(
    run: RunDir, word: str, said: str
) -> None:
    planned(run, "pivot_density")
    with pytest.raises(PivotTraceError, match=said):
        checks.check(config(run, word))
    # Entropy hangs on neither.
    planned(run, "entropy")
    checks.check(config(run, word))


def test_how_a_trace_travels_is_no_other_measure(run: RunDir) -> None:
    planned(run, "pivot_density")
    words = ("wire=float16", "timeout_s=9.0")
    checks.check(config(run, *(f"pivottrace.capture.{word}" for word in words)))


# Whose RUN/train is


def checkpoints(folder: Path, *words: str) -> tuple[str, ...]:
    return (f"trainer.default_local_dir={folder}", *words)


def take(run: RunDir, *words: str) -> None:
    with claimed(config(run, *words)):
        pass


def test_a_second_training_of_other_checkpoints_is_refused_and_both_are_named(
    run: RunDir, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    take(run, *checkpoints(first))
    take(run, *checkpoints(first))
    with pytest.raises(PivotTraceError, match=f"are in {first}, but this one's are in {second}: "):
        take(run, *checkpoints(second))
    # It may look: without re-triage nothing is written.
    take(run, *checkpoints(second), "pivottrace.retriage.enable=false")
    # Gone on from the first one's checkpoint, it is the same training in another folder.
    resumed = f"trainer.resume_from_path={first}/global_step_2"
    take(run, *checkpoints(second), "trainer.resume_mode=resume_path", resumed)
    with pytest.raises(PivotTraceError, match=f"are in {second}, but this one's are in {first}: "):
        take(run, *checkpoints(first))


def test_the_same_training_begun_anew_is_refused_once_it_has_a_checkpoint(
    run: RunDir, tmp_path: Path
) -> None:
    words = checkpoints(tmp_path / "mine", "trainer.resume_mode=disable")
    take(run, *words)
    # Killed before its first checkpoint, it begins again with the same arrivals.
    take(run, *words)
    (tmp_path / "mine" / "global_step_2").mkdir(parents=True)
    with pytest.raises(PivotTraceError, match="this one begins anew: resume that one,"):
        take(run, *words)
    take(run, *checkpoints(tmp_path / "mine"))


def test_a_run_directory_with_its_checkpoints_may_move(run: RunDir, tmp_path: Path) -> None:
    take(run, *checkpoints(run.path / "train" / "checkpoints"))
    moved = run.path.rename(tmp_path / "moved")
    take(RunDir.open(moved), *checkpoints(moved / "train" / "checkpoints"))


def test_two_trainings_at_once_are_refused_and_the_holder_is_named(
    run: RunDir, tmp_path: Path
) -> None:
    words = checkpoints(tmp_path / "mine")
    told = pytest.raises(PivotTraceError, match=rf"\(pid {os.getpid()}\) is working on .*train")
    with claimed(config(run, *words)), told:
        take(run, *words)
    take(run, *words)


def test_a_lock_that_was_handed_over_is_held_until_the_job_ends(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = checkpoints(tmp_path / "mine")
    file = tmp_path / "config.yaml"
    OmegaConf.save(config(run, *words), file)
    code = (
        "import sys; from omegaconf import OmegaConf\n"
        "from pivottrace_verl.training.claim import claimed\n"
        "with claimed(OmegaConf.load(sys.argv[1])):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    with run.lock("train") as lock:
        job = subprocess.Popen(
            [sys.executable, "-c", code, str(file)],
            env={**os.environ, LOCK: str(lock)},
            pass_fds=(lock,),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert job.stdout is not None and job.stdout.readline() == "held\n"
    # The command has let go; its job has not.
    with pytest.raises(PivotTraceError, match=rf"Another process \(pid {job.pid}\)"):
        take(run, *words)
    job.communicate("")
    assert job.returncode == 0
    take(run, *words)
    # A lock on another run's folder is none on this one's.
    other = make_run(tmp_path / "other")
    with other.lock("train") as lock, run.lock("train"):
        monkeypatch.setenv(LOCK, str(lock))
        with pytest.raises(PivotTraceError, match="Another process"):
            take(run, *words)


def test_a_job_takes_the_folder_before_anything_starts(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Path] = []

    def start(job: Any, task_runner_class: Any) -> None:
        started.append(run.path / "train")
        with pytest.raises(PivotTraceError, match="Another process"), run.lock("train"):
            pass

    monkeypatch.setattr(main_ppo, "run_ppo", start)
    main_ppo.run(config(run, *checkpoints(tmp_path / "mine")))
    with pytest.raises(PivotTraceError, match="but this one's are in"):
        main_ppo.run(config(run, *checkpoints(tmp_path / "other")))
    assert len(started) == 1
