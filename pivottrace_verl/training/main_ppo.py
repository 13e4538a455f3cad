"""`python -m pivottrace_verl.training.main_ppo`: verl's `main_ppo` with PivotTrace switched on.

Take the command line of a verl recipe and change the module's name: every verl option stays
overridable, and ours live in the `pivottrace:` block of `config/plugin/pivottrace.yaml`, which says
how a recipe with a configuration file of its own takes it up. With `PIVOTTRACE_DISABLE=1` this runs
stock verl on the same configuration, which is refused if some prompts have no label, because stock
verl cannot vote.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import signal
import sys
from typing import Any

import hydra
import ray
from omegaconf import DictConfig, open_dict
from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config
from verl.utils.device import auto_set_device
from verl.utils.import_utils import load_extern_object

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.plugin import disabled
from pivottrace_verl.training.checks import check
from pivottrace_verl.training.claim import claimed
from pivottrace_verl.training.launch import DIE_WITH_PARENT

_Runner: Any = TaskRunnerV1.__ray_metadata__.modified_class


class PivotTaskRunner(_Runner):
    """verl's task runner; its process knows our trainer and our rollout replica."""

    def run(self, config: DictConfig) -> None:
        from verl.trainer.ppo.v1 import trainer_base
        from verl.workers.rollout.replica import RolloutReplicaRegistry

        from pivottrace_verl.training.server import PivotReplica
        from pivottrace_verl.training.trainer import TRAINERS

        # Only in this process, which runs nothing but this training: verl compares names such as
        # "vllm" and "sync" in many places, so the names stay and the classes behind them change.
        RolloutReplicaRegistry.register("vllm", lambda: PivotReplica)
        trainer_base.TRAINER_REGISTRY.update(TRAINERS)
        super().run(config)


def stock(config: DictConfig) -> DictConfig:
    """The same configuration for stock verl: our hooks taken out."""
    import pyarrow.parquet as pq

    files = config.data.train_files
    unlabeled = 0
    for file in [files] if isinstance(files, str) else files:
        labels = pq.read_table(file, columns=["reward_model"])["reward_model"].to_pylist()
        unlabeled += sum(row is None or row["ground_truth"] is None for row in labels)
    if unlabeled:
        raise PivotTraceError(
            f"PIVOTTRACE_DISABLE=1 asks for stock verl, but {unlabeled} training prompts have no "
            "label and stock verl cannot train on them: unset it (pivottrace.capture.enable=false "
            "trains without attention capture)."
        )
    with open_dict(config):
        config.actor_rollout_ref.rollout.agent.agent_loop_manager_class = None
        config.actor_rollout_ref.rollout.custom = None
    return config


def fit_reward_arguments(config: DictConfig) -> None:
    """Take `answers`, which our own reward function has, out of the arguments of one that has not:
    a recipe that names its own function keeps ours in the configuration below it."""
    settings = config.reward.custom_reward_function
    if settings.path is None or "answers" not in (settings.get("reward_kwargs") or {}):
        return
    parameters = inspect.signature(load_extern_object(settings.path, settings.name)).parameters
    if any(p.name == "answers" or p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    with open_dict(config):
        del settings.reward_kwargs["answers"]


def run(config: DictConfig) -> None:
    """Validate and run one training job to its end."""
    auto_set_device(config)
    fit_reward_arguments(config)
    validate_config(
        config=config,
        use_reference_policy=need_reference_policy(config),
        use_critic=need_critic(config),
    )
    if disabled():
        run_ppo(stock(config), task_runner_class=TaskRunnerV1)
        return
    check(config)
    if not config.pivottrace.capture.enable:
        print(
            "pivottrace: attention is not captured (pivottrace.capture.enable=false): pivots and "
            "entropy are not measured while training.",
            flush=True,
        )
    runner: Any = ray.remote(PivotTaskRunner)
    with claimed(config):
        run_ppo(config, task_runner_class=runner)


def die_with_parent() -> None:
    """Ask the kernel (Linux) for SIGTERM when the process that started this one is gone."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


@hydra.main(config_path="config", config_name="pivottrace_trainer", version_base=None)
def main(config: DictConfig) -> None:
    """Hydra's entry: print our own refusals as one sentence."""
    if os.environ.get(DIE_WITH_PARENT):
        die_with_parent()
    try:
        run(config)
    except PivotTraceError as error:
        # From another process, Ray wraps it in its own traceback.
        print(f"error: {getattr(error, 'cause', error)}", file=sys.stderr, flush=True)
        os._exit(2)
    except ray.exceptions.RayActorError as error:
        print(
            f"error: the process that runs the training died, so training stops; started again, it "
            f"goes on from the last checkpoint. {error}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


if __name__ == "__main__":
    main()
