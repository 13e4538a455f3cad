"""What is refused before anything starts: settings under which the curriculum or the vote would
quietly not happen, each with one sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from verl.trainer.ppo.utils import need_critic
from verl.utils.import_utils import load_class_from_fqn

from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.pivots import DetectorConfig
from pivottrace_verl.pool import RunDir
from pivottrace_verl.training.agent_loop import PivotAgentLoopManager
from pivottrace_verl.training.steering import SteeringConfig

MODES = ("sync", "colocate_async", "separate_async")
"""verl's trainers that are extended."""

OF_PIVOTS = ("pivot_density", "pivot_count")
OF_TRACES = (*OF_PIVOTS, "entropy")
OF_LOGPROBS = ("nll",)
"""Estimators that training measures only with what their name says."""


def check(config: DictConfig) -> None:
    """Raises PivotTraceError for the first setting that cannot be."""
    for wrong, sentence in _refusals(config):
        if wrong:
            raise PivotTraceError(sentence)
    rollout = config.actor_rollout_ref.rollout
    block: Any = OmegaConf.to_container(config.pivottrace, resolve=True)
    steering = SteeringConfig.of(block, config.data.train_batch_size, rollout.n)
    vote = steering.vote
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
    if steering.retriage.enable and steering.run is not None:
        _check_retriage(steering.run, block, bool(rollout.calculate_log_probs))


def _check_retriage(path: Path, block: Mapping[str, Any], logprobs: bool) -> None:
    """Re-triage must measure anew what the run's plan ranks by, and by the same measure."""
    run = RunDir.open(path)
    estimator = run.triage().get("estimator")
    what = f"Re-triage goes on from the plan of {path}, which ranks prompts by {estimator}"
    if estimator in OF_LOGPROBS and not logprobs:
        raise PivotTraceError(
            f"{what}; training measures that only with "
            "actor_rollout_ref.rollout.calculate_log_probs=true."
        )
    if estimator in OF_TRACES and not block["capture"]["enable"]:
        raise PivotTraceError(
            f"{what}; training measures that only with pivottrace.capture.enable=true."
        )
    if estimator not in OF_PIVOTS:
        return
    manifest = run.manifest
    scored = manifest.get("settings", {}).get("score", {})
    theirs = _measure(manifest.get("detector", {}), scored.get("capture", {}))
    settings = ("enable", "timeout_s")
    capture = {k: v for k, v in block["capture"].items() if k not in settings}
    ours = _measure(block["detector"], capture)
    changed = [name for name in ours if ours[name] != theirs[name]]
    if changed:
        raise PivotTraceError(
            f"{what}, found with {', '.join(f'{name}={theirs[name]}' for name in changed)}, but "
            f"this training has {', '.join(str(ours[name]) for name in changed)}: its pivots "
            f"would be mixed with others. Take the settings in {path / 'manifest.json'}."
        )


def _measure(detector: Mapping[str, Any], capture: Mapping[str, Any]) -> dict[str, Any]:
    """Name in the configuration -> value, of all that a pivot hangs on."""
    found = DetectorConfig.from_dict(detector).to_dict()
    traced = CaptureConfig.from_dict(capture)
    return {f"pivottrace.detector.{name}": value for name, value in found.items()} | {
        f"pivottrace.capture.{name}": getattr(traced, name)
        for name in ("layers", "head_groups", "heads", "window", "sink")
    }


def _refusals(config: DictConfig) -> tuple[tuple[bool, str], ...]:
    """(whether it is so, what is said)."""
    data, rollout, trainer = config.data, config.actor_rollout_ref.rollout, config.trainer
    capture = bool(config.pivottrace.capture.enable)
    custom, model = rollout.custom, config.actor_rollout_ref.model
    most = max((n for n in config.pivottrace.rollouts.values() if n is not None), default=0)
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
            most > rollout.n,
            f"pivottrace.rollouts asks for {most} rollouts of a prompt, more than "
            f"actor_rollout_ref.rollout.n={rollout.n}, in whose units verl cuts a step into "
            "mini-batches: what is left over would be updates of their own, on as little as one "
            f"rollout. Set actor_rollout_ref.rollout.n={most}, and the other route's lower.",
        ),
        (
            need_critic(config),
            "PivotTrace weighs advantages by route, but a critic (algorithm.adv_estimator=gae or "
            "critic.enable=true) learns from every reward alike, votes and groups without a "
            "reward included: take an estimator without one, such as grpo, rloo or "
            "reinforce_plus_plus.",
        ),
        (
            capture and config.pivottrace.detector.tau is None,
            "pivottrace.detector.tau is not set: take the detector that `pivottrace score` froze "
            "in manifest.json, or set pivottrace.capture.enable=false.",
        ),
    )
