"""The overrides compose with verl's own configuration, and carry what a run on the CPU needs."""

import os
import subprocess
import sys

import pytest

from pivottrace_verl.cpu.settings import cpu_env, cpu_overrides


@pytest.fixture(scope="module")
def compose():
    hydra = pytest.importorskip("hydra")
    pytest.importorskip("verl")

    def build(*overrides: str):
        with hydra.initialize_config_module("verl.trainer.config", version_base=None):
            return hydra.compose("ppo_trainer", overrides=list(overrides))

    return build


def test_the_overrides_compose_with_verls_trainer(compose) -> None:
    config = compose(*cpu_overrides())
    assert config.trainer.device == "cpu"
    assert config.ray_kwargs.ray_init.num_gpus == 1
    assert config.actor_rollout_ref.rollout.engine_kwargs.vllm.distributed_executor_backend == "uni"
    assert config.actor_rollout_ref.ref.strategy == "fsdp2"
    for engine in (
        config.actor_rollout_ref.actor.fsdp_config,
        config.actor_rollout_ref.ref.fsdp_config,
    ):
        assert set(engine.mixed_precision.values()) == {"fp32"}
        assert not engine.use_torch_compile
    assert config.algorithm.rollout_correction.bypass_mode is False


def test_the_workers_get_the_environment_as_text(compose) -> None:
    config = compose(*cpu_overrides(env={"EXTRA": "7"}))
    variables = dict(config.ray_kwargs.ray_init.runtime_env.env_vars)
    assert variables == {**cpu_env(), "EXTRA": "7"}
    assert all(isinstance(value, str) for value in variables.values())


def test_the_users_override_after_ours_wins(compose) -> None:
    config = compose(*cpu_overrides(), "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=99")
    assert config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu == 99
    assert config.actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu == 99


def test_the_choices_reach_the_configuration(compose) -> None:
    config = compose(
        *cpu_overrides(
            threads=3,
            max_tokens=512,
            agent_workers=3,
            reward_workers=0,
            recompute_old_log_prob=False,
            ray_temp_dir="/tmp/short",
        )
    )
    assert config.actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu == 512
    assert config.actor_rollout_ref.rollout.agent.num_workers == 3
    assert config.reward.num_workers == 0
    assert config.ray_kwargs.ray_init.runtime_env.env_vars.OMP_NUM_THREADS == "3"
    assert config.algorithm.rollout_correction.bypass_mode is True
    assert config.ray_kwargs.ray_init._temp_dir == "/tmp/short"


def test_the_command_prints_what_a_shell_can_pass_on() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pivottrace_verl.cpu.settings"],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == cpu_overrides()
