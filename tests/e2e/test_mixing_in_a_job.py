"""What a job with both routes trains on, read from what it leaves behind: advantages by route, with
rollouts by route and the rows that verl adds to fill its mini-batch; and validation, which votes
must not touch."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pivottrace_verl.training.reward import compute_score
from tests.e2e.verl_job import Job, prepare
from tests.verl_jobs import labelled_rows, read_lines, write_rows

pytestmark = pytest.mark.slow

ROLLOUTS = {"annotate": 4, "self_train": 6}
WEIGHTS = {"annotate": 0.8, "self_train": 0.5}
BATCH, STEPS, N_VAL = 8, 2, 8


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job that ended well; its validation holds the true answers of self_train prompts, so that a
    vote in their place would show."""
    work = tmp_path_factory.mktemp("mixing")
    prepare(work)
    unlabelled = {
        row["extra_info"]["pt_id"]
        for row in pq.read_table(work / "rows.parquet").to_pylist()
        if not row["extra_info"]["labeled"]
    }
    val = [r for r in labelled_rows(work / "data") if r["extra_info"]["pt_id"] in unlabelled]
    for row in val:
        row["extra_info"] |= {"labeled": False, "route": "self_train"}
    words = [
        f"data.val_files={write_rows(work / 'val.parquet', val[:N_VAL])}",
        "data.gen_batch_size=2",
        "actor_rollout_ref.rollout.n=6",
        *(f"pivottrace.rollouts.{route}={n}" for route, n in ROLLOUTS.items()),
        *(f"pivottrace.weights.{route}={weight}" for route, weight in WEIGHTS.items()),
        "algorithm.filter_groups.enable=true",
        "algorithm.filter_groups.metric=acc",
        "actor_rollout_ref.actor.use_dynamic_bsz=true",
        "actor_rollout_ref.rollout.val_kwargs.n=4",
        "actor_rollout_ref.rollout.val_kwargs.do_sample=true",
        "actor_rollout_ref.rollout.val_kwargs.temperature=1.0",
        "trainer.val_before_train=true",
        "trainer.test_freq=1",
        f"trainer.validation_data_dir={work / 'validation'}",
        f"trainer.total_training_steps={STEPS}",
    ]
    one = Job(work, "job", *words)
    try:
        assert one.wait() == 0, one.words()[-5000:]
    finally:
        one.stop()
    return one


def groups(job: Job, step: int) -> dict[str, list[list[float]]]:
    """Route -> the rewards of each of its groups, by verl's own dump of the step."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in read_lines(job.folder / "rollouts" / f"{step}.jsonl"):
        found[row["uid"].split("_")[0]].append(row)
    routes: dict[str, list[list[float]]] = {route: [] for route in ROLLOUTS}
    for uid, rows in found.items():
        if not uid.startswith("pad"):
            route = "self_train" if rows[0]["gts"] is None else "annotate"
            routes[route].append([row["score"] for row in rows])
    return routes


def advantages(rewards: list[float]) -> list[float]:
    """GRPO's: of a group's rewards, with the standard deviation of a sample."""
    spread = float(np.std(rewards, ddof=1)) + 1e-6
    return [(reward - float(np.mean(rewards))) / spread for reward in rewards]


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_each_routes_advantages_are_those_of_its_rewards_times_its_weight_once(
    job: Job, step: int
) -> None:
    told = job.metrics()[step]
    routes = groups(job, step)
    assert all(routes.values()), "a route is absent from the step"
    assert sum(map(len, routes.values())) == BATCH
    scaled: list[float] = []
    for route, rewards in routes.items():
        assert {len(group) for group in rewards} == {ROLLOUTS[route]}
        assert told[f"pivottrace/{route}/rollouts"] == ROLLOUTS[route] * len(rewards)
        # A mean over the rollouts, rounded as one.
        weights = [WEIGHTS[route]] * (ROLLOUTS[route] * len(rewards))
        assert told[f"pivottrace/{route}/weight"] == float(np.mean(weights))
        ours = [WEIGHTS[route] * a for group in rewards for a in advantages(group)]
        scale = told[f"pivottrace/{route}/advantage_scale"]
        assert scale == pytest.approx(float(np.mean(np.abs(ours))), rel=1e-4)
        scaled += ours
    # What the actor was given, as verl read it back from its store.
    assert told["critic/advantages/max"] == pytest.approx(max(scaled), rel=1e-4)
    assert told["critic/advantages/min"] == pytest.approx(min(scaled), rel=1e-4)


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_rows_that_only_fill_the_mini_batch_are_not_counted(job: Job, step: int) -> None:
    lines = read_lines(job.folder / "rollouts" / f"{step}.jsonl")
    padding = sum(row["uid"].startswith("pad") for row in lines)
    real = sum(n * len(groups(job, step)[route]) for route, n in ROLLOUTS.items())
    assert padding > 0 and len(lines) == real + padding == BATCH * max(ROLLOUTS.values())
    told = job.metrics()[step]
    assert sum(told[f"pivottrace/{route}/rollouts"] for route in ROLLOUTS) == real
    assert told["pivottrace/capture/traced"] == real


@pytest.mark.parametrize("step", range(STEPS + 1))
def test_validation_scores_are_the_reward_functions_whoever_agrees(job: Job, step: int) -> None:
    lines = read_lines(job.folder.parent / "validation" / f"{step}.jsonl")
    assert len(lines) == 4 * N_VAL
    right = [
        compute_score("countdown", line["output"], line["gts"], answers="expression")["score"]
        for line in lines
    ]
    assert [line["score"] for line in lines] == [line["acc"] for line in lines] == right
    means = [v for k, v in job.metrics()[step].items() if k.startswith("val-core/")]
    assert any(math.isclose(value, float(np.mean(right))) for value in means)


def test_some_answer_in_validation_is_right_and_some_is_wrong(job: Job) -> None:
    scores = {
        line["score"]
        for file in (job.folder.parent / "validation").iterdir()
        for line in map(json.loads, Path(file).read_text().splitlines())
    }
    assert scores == {0.0, 1.0}
