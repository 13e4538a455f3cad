"""Reward functions and reward managers of a recipe's own, in real jobs with both routes."""

from pathlib import Path

import pytest

from tests.e2e.verl_job import Job
from tests.verl_jobs import read_lines

pytestmark = pytest.mark.slow


def function(name: str) -> tuple[str, str]:
    return (
        "reward.custom_reward_function.path=pkg://tests.e2e.own_rewards",
        f"reward.custom_reward_function.name={name}",
    )


def run(work: Path, name: str, *overrides: str) -> tuple[int | None, Job]:
    """A job's status, and the job."""
    one = Job(work, name, *overrides, "trainer.total_training_steps=2")
    try:
        return one.wait(), one
    finally:
        one.stop()


def test_a_bare_score_and_dapos_penalty_train_both_routes(work: Path) -> None:
    status, one = run(
        work,
        "dapo",
        *function("bare"),
        "reward.reward_manager.name=dapo",
        # A penalty from the ninth token on.
        "+reward.reward_kwargs.max_resp_len=128",
        "+reward.reward_kwargs.overlong_buffer_cfg.enable=true",
        "+reward.reward_kwargs.overlong_buffer_cfg.len=120",
        "+reward.reward_kwargs.overlong_buffer_cfg.penalty_factor=0.05",
        "+reward.reward_kwargs.overlong_buffer_cfg.log=false",
        # So that a policy that is hardly ever right is rewarded.
        "pivottrace.vote.otherwise=soft",
    )
    assert status == 0, one.words()[-5000:]
    steps = one.metrics()
    assert len(steps) == 2
    scores = []
    for number, step in enumerate(steps, 1):
        assert step["pivottrace/rollouts/failed"] == step["pivottrace/prompts/failed"] == 0
        scores += [row["score"] for row in read_lines(one.folder / "rollouts" / f"{number}.jsonl")]
        for route in ("annotate", "self_train"):
            if f"pivottrace/{route}/prompts" in step:
                assert step[f"pivottrace/{route}/agreement"] > 0.0
                assert step[f"pivottrace/{route}/weight"] == 1.0
    assert len(scores) == 64
    # Of the least share that a vote gives no penalty leaves less; of a wrong answer, less than 0.
    assert any(score % 0.25 and score > 0.19 for score in scores)
    assert any(-0.051 < score < 0.0 for score in scores)


def test_a_reward_function_that_fails_without_a_label_ends_the_job_with_a_sentence(
    work: Path,
) -> None:
    status, one = run(work, "fails", *function("needs_a_label"))
    assert status == 2, one.words()[-5000:]
    said = one.words()[-3000:]
    assert "error: The reward function failed on prompt " in said
    assert "(AttributeError: 'NoneType' object has no attribute 'strip')" in said
