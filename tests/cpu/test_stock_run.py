"""Stock verl trains on the CPU: GRPO with vLLM rollouts, FSDP2 and a reference model."""

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from pivottrace_verl.cpu.settings import cpu_env, cpu_overrides

from .conftest import TinyJob

pytest.importorskip("verl")
pytest.importorskip("vllm")


def run_stock_verl(job: TinyJob, folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Metrics of each step of `verl.trainer.main_ppo`, which must end with status 0."""
    metrics = folder / "metrics.jsonl"
    # Unix sockets have short paths, pytest's folders may be long.
    with tempfile.TemporaryDirectory(prefix="pt", dir="/tmp") as ray_temp:
        command = [
            *(sys.executable, "-m", "verl.trainer.main_ppo"),
            *cpu_overrides(ray_temp_dir=ray_temp, env={"VERL_FILE_LOGGER_PATH": str(metrics)}),
            "algorithm.adv_estimator=grpo",
            f"data.train_files={job.train}",
            f"data.val_files={job.val}",
            "data.train_batch_size=4",
            "data.max_prompt_length=16",
            "data.max_response_length=16",
            f"actor_rollout_ref.model.path={job.model}",
            "actor_rollout_ref.actor.ppo_mini_batch_size=4",
            "actor_rollout_ref.rollout.n=4",
            f"reward.custom_reward_function.path={job.reward}",
            "trainer.total_training_steps=2",
            "trainer.val_before_train=False",
            "trainer.test_freq=-1",
            "trainer.resume_mode=disable",
            "trainer.logger=[file]",
            f"trainer.default_local_dir={folder / 'checkpoints'}",
            *overrides,
        ]
        done = subprocess.run(
            command,
            cwd=folder,
            # The kill switch turns tracing off, never the platform.
            env={**os.environ, **cpu_env(), "PIVOTTRACE_DISABLE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=1200,
        )
    assert done.returncode == 0, done.stdout[-5000:]
    return [json.loads(line)["data"] for line in metrics.read_text().splitlines()]


@pytest.mark.e2e
def test_stock_verl_trains_two_steps_and_its_rollouts_follow_the_weights(
    tiny_job: TinyJob, tmp_path: Path
) -> None:
    steps = run_stock_verl(
        tiny_job,
        tmp_path,
        # Large enough that a missed weight sync would show a hundredfold in the second step.
        "actor_rollout_ref.actor.optim.lr=1e-3",
        "actor_rollout_ref.actor.use_kl_loss=True",
        "actor_rollout_ref.actor.entropy_coeff=0.1",
        "trainer.save_freq=2",
    )
    trained = [step for step in steps if "actor/pg_loss" in step]
    assert [step["training/global_step"] for step in trained] == [1, 2]
    for step in trained:
        assert step["training/rollout_probs_diff_max"] < 1e-5
        assert math.isfinite(step["actor/loss"]) and step["actor/grad_norm"] > 0
    first, second = (step["actor/kl_loss"] for step in trained)
    assert first == pytest.approx(0, abs=1e-6)
    assert second > 1e-6
    saved = tmp_path / "checkpoints" / "global_step_2" / "actor"
    assert (saved / "model_world_size_1_rank_0.pt").stat().st_size > 0
