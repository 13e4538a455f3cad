"""A recipe of verl's becomes one of ours by its entry point, and nothing else of it changes."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir, initialize_config_module
from omegaconf import OmegaConf

from pivottrace_verl.errors import PivotTraceError

checks = pytest.importorskip("pivottrace_verl.training.checks", reason="verl is not installed")

RECIPE = (
    "algorithm.adv_estimator=rloo",
    "algorithm.use_kl_in_reward=False",
    "data.train_files=[/data/train.parquet,/data/more.parquet]",
    "data.val_files=/data/val.parquet",
    "data.train_batch_size=256",
    "data.max_prompt_length=512",
    "data.max_response_length=4096",
    "data.filter_overlong_prompts=True",
    "data.truncation=error",
    "actor_rollout_ref.model.path=Qwen/Qwen3-4B-Base",
    "actor_rollout_ref.model.use_remove_padding=True",
    "actor_rollout_ref.actor.optim.lr=1e-6",
    "actor_rollout_ref.actor.ppo_mini_batch_size=64",
    "actor_rollout_ref.actor.use_dynamic_bsz=True",
    "actor_rollout_ref.actor.use_kl_loss=True",
    "actor_rollout_ref.actor.kl_loss_coef=0.001",
    "actor_rollout_ref.actor.fsdp_config.param_offload=False",
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.n=5",
    "actor_rollout_ref.rollout.temperature=0.9",
    "actor_rollout_ref.rollout.gpu_memory_utilization=0.6",
    "+actor_rollout_ref.rollout.engine_kwargs.vllm.disable_mm_preprocessor_cache=True",
    "actor_rollout_ref.ref.fsdp_config.param_offload=True",
    "trainer.critic_warmup=0",
    "trainer.logger=[console,wandb]",
    "trainer.n_gpus_per_node=8",
    "trainer.nnodes=2",
    "trainer.save_freq=20",
    "trainer.total_epochs=15",
)
"""A command line of overrides as users of verl's own trainer have it, prefixes included."""

OURS = {
    "data.shuffle",
    "data.dataloader_num_workers",
    "actor_rollout_ref.rollout.agent.agent_loop_manager_class",
    "reward.custom_reward_function.path",
    "reward.custom_reward_function.reward_kwargs.answers",
}
"""What differs from verl's own configuration, besides the blocks named pivottrace."""

TAU = "pivottrace.detector.tau=0.05"


def flat(config: Any, path: str = "") -> dict[str, Any]:
    """Dotted name -> value."""
    if not isinstance(config, dict) or not config:
        return {path: config}
    return {
        name: value
        for key, below in config.items()
        for name, value in flat(below, f"{path}.{key}" if path else str(key)).items()
    }


def container(config: Any) -> dict[str, Any]:
    return flat(OmegaConf.to_container(config, resolve=False))


def stock(*overrides: str) -> dict[str, Any]:
    with initialize_config_module("verl.trainer.config", version_base=None):
        return container(compose("ppo_trainer", overrides=list(overrides)))


def composed(*overrides: str) -> Any:
    with initialize_config_module("pivottrace_verl.training.config", version_base=None):
        return compose("pivottrace_trainer", overrides=list(overrides))


def changed(ours: dict[str, Any], theirs: dict[str, Any]) -> set[str]:
    """Names that are only in ours or have another value; nothing of verl's may be gone."""
    # verl's null became a block.
    gone = {name for name in theirs if name not in ours and theirs[name] is not None}
    assert not gone
    names = {name for name, value in ours.items() if name not in theirs or theirs[name] != value}
    return {name for name in names if "pivottrace." not in name}


def test_verls_command_line_composes_and_every_value_of_it_and_every_default_of_verls_stays() -> (
    None
):
    config = composed(*RECIPE, TAU)
    assert changed(container(config), stock(*RECIPE)) <= OURS
    checks.check(config)


def test_without_overrides_only_what_the_file_says_differs_from_verl() -> None:
    found = changed(container(composed()), stock())
    assert found <= OURS | {
        "algorithm.adv_estimator",
        "actor_rollout_ref.rollout.name",
        "actor_rollout_ref.rollout.n",
    }


def recipe_file(folder: Path, name: str, searchpath: str, defaults: str) -> None:
    folder.joinpath(f"{name}.yaml").write_text(
        f"hydra: {{searchpath: [{searchpath}]}}\n"
        f"defaults: [{defaults}]\n"
        "data: {train_batch_size: 48}\n"
        "actor_rollout_ref: {rollout: {name: vllm, n: 16}}\n"
        "algorithm: {adv_estimator: rloo}\n"
    )


VERL = "pkg://verl.trainer.config"
PIVOTTRACE = "pkg://pivottrace_verl.training.config"


@pytest.mark.parametrize("by_file", [True, False])
def test_a_recipe_with_a_file_of_its_own_takes_the_block_up_and_keeps_its_values(
    tmp_path: Path, by_file: bool, recwarn: pytest.WarningsRecorder
) -> None:
    if by_file:
        recipe_file(
            tmp_path, "mine", f"{VERL}, {PIVOTTRACE}", "ppo_trainer, plugin: pivottrace, _self_"
        )
        words = []
    else:
        recipe_file(tmp_path, "mine", VERL, "ppo_trainer, _self_")
        words = [f"hydra.searchpath=[{VERL},{PIVOTTRACE}]", "+plugin=pivottrace"]
    with initialize_config_dir(str(tmp_path), version_base=None):
        config = compose("mine", overrides=[*words, TAU, "pivottrace.answers=exact"])
    assert not [w for w in recwarn if "not available" in str(w.message)]
    checks.check(config)
    assert config.data.train_batch_size == 48
    assert config.actor_rollout_ref.rollout.n == 16
    assert config.algorithm.adv_estimator == "rloo"
    assert config.reward.custom_reward_function.reward_kwargs.answers == "exact"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("data.shuffle=True", "data.shuffle must be false"),
        ("data.dataloader_num_workers=8", "must be 0 with the triage curriculum"),
        ("trainer.use_v1=False", "use_v1 must be true"),
        ("trainer.v1.trainer_mode=elsewhere", "must be one of sync, colocate_async, separate_a"),
        ("actor_rollout_ref.rollout.name=sglang", "captured in vLLM"),
        ("actor_rollout_ref.rollout.custom=null", "must keep its entry pivottrace"),
        ("actor_rollout_ref.rollout.disaggregation.enabled=True", "different engines"),
        ("actor_rollout_ref.rollout.n=1", "at least 2 rollouts"),
        ("reward.reward_model.enable=True", "over extracted answers"),
        ("pivottrace.rollouts.self_train=6", "for 6 rollouts of a prompt, more than .*n=5, in"),
        ("algorithm.adv_estimator=gae", "a critic .* learns from every reward alike"),
        ("critic.enable=True", "a critic .* learns from every reward alike"),
        ("pivottrace.detector.tau=null", "tau is not set"),
        ("actor_rollout_ref.rollout.agent.agent_loop_manager_class="
         "verl.trainer.ppo.v1.AgentLoopManagerTQ", "AgentLoopManagerTQ, which takes no vote"),
    ],
)  # fmt: skip
def test_what_would_undo_the_curriculum_or_the_vote_is_refused(word: str, said: str) -> None:
    with pytest.raises(PivotTraceError, match=said):
        checks.check(composed(*RECIPE, TAU, word))


@pytest.mark.parametrize("mode", checks.MODES)
def test_all_of_verls_v1_trainers_are_accepted(mode: str) -> None:
    checks.check(composed(*RECIPE, TAU, f"trainer.v1.trainer_mode={mode}"))


@pytest.mark.parametrize("rank", ["actor_rollout_ref.model.lora_rank=8",
                                  "actor_rollout_ref.model.lora.rank=8"])  # fmt: skip
def test_lora_is_accepted_where_rollouts_see_the_adapter(rank: str) -> None:
    separate = "trainer.v1.trainer_mode=separate_async"
    checks.check(composed(*RECIPE, TAU, rank))
    with pytest.raises(PivotTraceError, match="would never follow the adapter"):
        checks.check(composed(*RECIPE, TAU, rank, separate))
    merged = "actor_rollout_ref.model.lora.merge=true"
    checks.check(composed(*RECIPE, TAU, rank, separate, merged))


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ("data_source, solution_str, ground_truth, extra_info=None", False),
        ("data_source, solution_str, ground_truth, extra_info=None, answers='math'", True),
        ("**everything", True),
    ],
)
def test_a_reward_function_gets_our_argument_only_if_it_takes_it(
    tmp_path: Path, arguments: str, kept: bool
) -> None:
    main = pytest.importorskip("pivottrace_verl.training.main_ppo")
    file = tmp_path / "reward.py"
    file.write_text(f"def mine({arguments}):\n    return 1.0\n")
    config = composed(
        f"reward.custom_reward_function.path={file}",
        "reward.custom_reward_function.name=mine",
        "+reward.custom_reward_function.reward_kwargs.limit=3",
    )
    main.fit_reward_arguments(config)
    wanted = {"answers": "math", "limit": 3} if kept else {"limit": 3}
    assert config.reward.custom_reward_function.reward_kwargs == wanted


def test_our_own_reward_function_and_verls_keep_the_configuration() -> None:
    main = pytest.importorskip("pivottrace_verl.training.main_ppo")
    for more in ((), ("reward.custom_reward_function.path=null",)):
        config = composed(*more)
        main.fit_reward_arguments(config)
        assert config == composed(*more)
