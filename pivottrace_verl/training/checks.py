"""What is refused before anything starts: settings under which the curriculum or the vote would
quietly not happen, each with one sentence.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf
from verl.utils.import_utils import load_class_from_fqn

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.training.agent_loop import PivotAgentLoopManager
from pivottrace_verl.training.steering import SteeringConfig

MODES = ("sync", "colocate_async", "separate_async")
"""verl's trainers that are extended."""


def check(config: DictConfig) -> None:
    """Raises PivotTraceError for the first setting that cannot be."""
    for wrong, sentence in _refusals(config):
        if wrong:
            raise PivotTraceError(sentence)
    rollout = config.actor_rollout_ref.rollout
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
    manager = load_class_from_fqn(rollout.agent.agent_loop_manager_class, "AgentLoopManager")
    if not issubclass(manager, PivotAgentLoopManager):
        raise PivotTraceError(
            "actor_rollout_ref.rollout.agent.agent_loop_manager_class is "
            f"{manager.__name__}, which takes no vote: leave it alone, or derive it from "
            "pivottrace_verl.training.agent_loop.PivotAgentLoopManager."
        )


def _refusals(config: DictConfig) -> tuple[tuple[bool, str], ...]:
    """(whether it is so, what is said)."""
    data, rollout, trainer = config.data, config.actor_rollout_ref.rollout, config.trainer
    capture = bool(config.pivottrace.capture.enable)
    custom, model = rollout.custom, config.actor_rollout_ref.model
    lora = model.lora_rank > 0 or model.lora.rank > 0
    return (
        (
            not trainer.use_v1,
            "trainer.use_v1 must be true: PivotTrace extends verl's V1 trainer.",
        ),
        (
            trainer.v1.trainer_mode not in MODES,
            f"trainer.v1.trainer_mode is {trainer.v1.trainer_mode!r}, but must be one of "
            f"{', '.join(MODES)}.",
        ),
        (
            data.dataloader_num_workers != 0,
            "data.dataloader_num_workers must be 0 with the triage curriculum (it is "
            f"{data.dataloader_num_workers}): workers read prompts ahead, so the curriculum would "
            "neither see results in time nor resume where it was.",
        ),
        (
            bool(data.shuffle),
            "data.shuffle must be false: shuffling would undo the triage curriculum's order "
            "(pivottrace.curriculum.order=random gives a shuffled one).",
        ),
        (
            rollout.name != "vllm",
            f"actor_rollout_ref.rollout.name is {rollout.name!r}; attention is captured in vLLM.",
        ),
        (
            custom is None or "pivottrace" not in custom,
            "actor_rollout_ref.rollout.custom must keep its entry pivottrace, through which the "
            "rollout servers see their settings: add to it, do not replace it.",
        ),
        (
            bool(rollout.disaggregation.enabled) and capture,
            "actor_rollout_ref.rollout.disaggregation.enabled must be false while attention is "
            "captured: prefill and decoding would run in different engines.",
        ),
        (
            lora and not model.lora.merge and trainer.v1.trainer_mode == "separate_async",
            "actor_rollout_ref.model.lora.merge must be true in separate_async: verl sends its "
            "rollouts the base model's weights only, so they would never follow the adapter.",
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
            capture and config.pivottrace.detector.tau is None,
            "pivottrace.detector.tau is not set: take the detector that `pivottrace score` froze "
            "in manifest.json, or set pivottrace.capture.enable=false.",
        ),
    )
