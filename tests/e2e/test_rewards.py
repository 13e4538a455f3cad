"""Reward functions and reward managers of a recipe's own, in real jobs with both routes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.verl_job import Job, prepare
from tests.verl_jobs import read_lines

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards")
    prepare(path)
    return path


@pytest.fixture
def job(work: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Job]]:
    """Starts a job, and ends it if it is left."""
    started: list[Job] = []

    def start(*overrides: str) -> Job:
        started.append(Job(work, request.node.name, *overrides))
        return started[-1]

    yield start
    for one in started:
        one.stop()


def function(name: str) -> tuple[str, str]:
    return (
        "reward.custom_reward_function.path=pkg://tests.e2e.own_rewards",
        f"reward.custom_reward_function.name={name}",
    )


def test_a_bare_score_and_dapos_penalty_train_both_routes(job: Callable[..., Job]) -> None:
    one = job(
        *function("bare"),
        "reward.reward_manager.name=dapo",
        # A penalty from the ninth token on.
        "+reward.reward_kwargs.max_resp_len=128",
        "+reward.reward_kwargs.overlong_buffer_cfg.enable=true",
        "+reward.reward_kwargs.overlong_buffer_cfg.len=120",
        "+reward.reward_kwargs.overlong_buffer_cfg.penalty_factor=0.5",
        "+reward.reward_kwargs.overlong_buffer_cfg.log=false",
        "trainer.total_training_steps=2",
    )
    assert one.wait() == 0, one.words()[-5000:]
    steps = one.metrics()
    assert len(steps) == 2
    right = []
    for number, step in enumerate(steps, 1):
        assert step["pivottrace/rollouts/failed"] == step["pivottrace/prompts/failed"] == 0
        scores = [row["score"] for row in read_lines(one.folder / "rollouts" / f"{number}.jsonl")]
        assert len(scores) == 32 and any(score % 1.0 for score in scores)
        right += [score for score in scores if score > 0.5]
        for route in ("annotate", "self_train"):
            if f"pivottrace/{route}/prompts" in step:
                shares = [step[f"pivottrace/{route}/{n}"] for n in ("mixed", "all_right")]
                assert all(0.0 <= share <= 1.0 for share in shares)
                assert step[f"pivottrace/{route}/agreement"] > 0.0
    assert right


def test_a_reward_function_that_fails_without_a_label_ends_the_job_with_a_sentence(
    job: Callable[..., Job],
) -> None:
    one = job(*function("needs_a_label"), "trainer.total_training_steps=2")
    assert one.wait() == 2
    said = one.words()[-3000:]
    assert "error: The reward function failed on prompt " in said
    assert "(AttributeError: 'NoneType' object has no attribute 'strip')" in said
