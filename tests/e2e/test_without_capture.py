"""Training where attention cannot be captured: both rewards, the curriculum and the votes go on."""

from pathlib import Path

import pytest

from tests.e2e.verl_job import Job, prepare

pytestmark = pytest.mark.slow


def test_training_without_capture_votes_and_measures_what_needs_no_trace(tmp_path: Path) -> None:
    prepare(tmp_path)
    job = Job(
        tmp_path,
        "off",
        "pivottrace.capture.enable=false",
        # As for a pool that was scored without traces.
        "pivottrace.detector.tau=null",
        "pivottrace.vote.kind=weighted",
        "actor_rollout_ref.rollout.calculate_log_probs=true",
        "trainer.total_training_steps=2",
    )
    assert job.wait() == 0, job.words()[-5000:]
    steps = job.metrics()
    assert len(steps) == 2
    for step in steps:
        assert step["pivottrace/capture/traced"] == 0
        assert "pivottrace/capture/dropped" not in step
        for route in ("annotate", "self_train"):
            assert step[f"pivottrace/{route}/prompts"] > 0
            assert 0 <= step[f"pivottrace/{route}/agreement"] <= 1
            assert f"pivottrace/{route}/pivot_density" not in step
    assert "pivottrace: attention is not captured" in job.words()
