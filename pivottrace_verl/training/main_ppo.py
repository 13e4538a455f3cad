"""`python -m pivottrace_verl.training.main_ppo`: verl's `main_ppo` with PivotTrace switched on.

Every verl option stays overridable; ours live in the `pivottrace:` block of
`config/pivottrace_trainer.yaml`. With `PIVOTTRACE_DISABLE=1` this runs stock verl on the same
configuration, which is refused if some prompts have no label, because stock verl cannot vote.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import Any

import hydra
import ray
from omegaconf import DictConfig, OmegaConf, open_dict
from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config
from verl.utils.device import auto_set_device

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.plugin import disabled
from pivottrace_verl.training.launch import DIE_WITH_PARENT
from pivottrace_verl.training.steering import SteeringConfig

MODES = ("sync", "colocate_async", "separate_async")

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


def check(config: DictConfig) -> None:
    """Refuse settings under which the triage curriculum or the vote would quietly not happen."""
    rollout = config.actor_rollout_ref.rollout
    for wrong, sentence in (
        (
            not config.trainer.use_v1,
            "trainer.use_v1 must be true: PivotTrace extends verl's V1 trainer.",
        ),
        (
            config.trainer.v1.trainer_mode not in MODES,
            f"trainer.v1.trainer_mode is {config.trainer.v1.trainer_mode!r}, but must be one of "
            f"{', '.join(MODES)}.",
        ),
        (
            rollout.name != "vllm",
            f"actor_rollout_ref.rollout.name is {rollout.name!r}; attention is captured in vLLM.",
        ),
        (
            bool(rollout.disaggregation.enabled) and config.pivottrace.capture.enable,
            "actor_rollout_ref.rollout.disaggregation.enabled must be false while attention is "
            "captured: prefill and decoding would run in different engines.",
        ),
        (
            bool(config.reward.reward_model.enable),
            "reward.reward_model.enable must be false: votes are taken over extracted answers.",
        ),
        (
            rollout.n < 2,
            f"actor_rollout_ref.rollout.n is {rollout.n}; a vote needs at least 2 rollouts.",
        ),
        (
            config.pivottrace.capture.enable and config.pivottrace.detector.tau is None,
            "pivottrace.detector.tau is not set: take the detector that `pivottrace score` froze "
            "in manifest.json, or set pivottrace.capture.enable=false.",
        ),
    ):
        if wrong:
            raise PivotTraceError(sentence)
    block: Any = OmegaConf.to_container(config.pivottrace, resolve=True)
    vote = SteeringConfig.of(block, config.data.train_batch_size, rollout.n).vote
    if vote.kind == "weighted" and vote.weight == "pivots" and not block["capture"]["enable"]:
        raise PivotTraceError(
            "pivottrace.vote.weight is pivots, but pivottrace.capture.enable is false, so no "
            "rollout's pivots are known."
        )
    if vote.kind == "weighted" and vote.weight == "certainty" and not rollout.calculate_log_probs:
        raise PivotTraceError(
            "pivottrace.vote.weight is certainty, which needs "
            "actor_rollout_ref.rollout.calculate_log_probs=true."
        )


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
            "label and stock verl cannot train on them."
        )
    with open_dict(config):
        config.actor_rollout_ref.rollout.agent.agent_loop_manager_class = None
        config.actor_rollout_ref.rollout.custom = None
    return config


def run(config: DictConfig) -> None:
    """Validate and run one training job to its end."""
    auto_set_device(config)
    validate_config(
        config=config,
        use_reference_policy=need_reference_policy(config),
        use_critic=need_critic(config),
    )
    if disabled():
        run_ppo(stock(config), task_runner_class=TaskRunnerV1)
        return
    check(config)
    runner: Any = ray.remote(PivotTaskRunner)
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
