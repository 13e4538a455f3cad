"""A training run goes on only with what it began with; a refusal names both sides. Until a new
checkpoint is whole, the one before can be gone on from."""

import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
from verl.utils.checkpoint.checkpoint_manager import BaseCheckpointManager

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.pool import RunDir
from pivottrace_verl.training import launch
from pivottrace_verl.training.launch import TrainConfig
from tests.triaged_run import buy, make_run, note_scoring

CONFIG = TrainConfig(steps=3, batch_size=4)


@pytest.fixture
def begun(tmp_path: Path) -> RunDir:
    """A run whose training has begun."""
    run = make_run(tmp_path)
    asked = {r["pt_id"] for r in run.plan().to_pylist() if r["route"] == "annotate"}
    buy(run, dict.fromkeys(asked - set(run.ledger().labels()), "1"), "annotate")
    prepare(run, CONFIG)
    return run


def prepare(run: RunDir, config: TrainConfig, *extra: str) -> None:
    """What `train` does before it starts verl."""
    with ExitStack() as held:
        assert launch._prepare(run, config, extra, held) is not None


def refused(run: RunDir, config: TrainConfig, *extra: str) -> str:
    """The sentence; the run's files are as before."""
    before = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    with pytest.raises(PivotTraceError) as refusal:
        launch.train(run, config, extra, lambda step, metrics: None)
    after = {file: file.read_bytes() for file in run.path.rglob("*") if file.is_file()}
    assert {f.name for f in after if after[f] != before.get(f)} <= {"lock"}
    return str(refusal.value)


def test_the_same_command_goes_on(begun: RunDir) -> None:
    prepare(begun, CONFIG)


def test_other_settings_are_refused(begun: RunDir) -> None:
    sentence = refused(begun, TrainConfig(steps=3, batch_size=4, order="random"))
    assert "'order': 'mixed'" in sentence and "'order': 'random'" in sentence
    sentence = refused(begun, CONFIG, "pivottrace.vote.quorum=3")
    assert "overrides: [] then, ['pivottrace.vote.quorum=3'] now" in sentence


def test_another_plan_is_refused(begun: RunDir) -> None:
    then = begun.stage_fingerprint("plan")
    rows = begun.plan().to_pylist()
    begun.write_plan([*rows[:-1], {**rows[-1], "route": "drop"}], begun.triage())
    now = begun.stage_fingerprint("plan")
    assert f"plan: '{then}' then, '{now}' now" in refused(begun, CONFIG)


def test_another_pool_is_refused(begun: RunDir, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", prompt="What is {i} and two?")
    shutil.copy(other.path / "pool.parquet", begun.path)
    sentence = refused(begun, CONFIG)
    assert begun.stage_fingerprint("pool") in sentence
    assert other.stage_fingerprint("pool") in sentence


def test_the_checkpoint_that_would_be_resumed_has_its_weights_at_any_moment(
    begun: RunDir, tmp_path: Path
) -> None:
    note_scoring(begun)
    settings = dict(word.split("=", 1) for word in launch.overrides(begun, CONFIG, tmp_path))
    keep = int(settings["trainer.max_actor_ckpt_to_keep"])
    manager = object.__new__(BaseCheckpointManager)
    manager.previous_saved_paths = []
    named: Path | None = None
    for step in range(5):
        weights = tmp_path / f"global_step_{step}"
        manager.ensure_checkpoint_capacity(keep)
        weights.mkdir()
        manager.register_checkpoint(str(weights), keep)
        # Only now does verl write down that this step is the one to go on from.
        assert named is None or named.exists()
        named = weights
