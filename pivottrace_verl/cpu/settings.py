"""Hydra overrides and environment variables of a verl run on the CPU, in one place.

    VERL_PLATFORM=cpu python -m verl.trainer.main_ppo $(python -m pivottrace_verl.cpu.settings) \\
        algorithm.adv_estimator=grpo actor_rollout_ref.model.path=... data.train_files=...

Our trainer, the recipes and the tests use the same two functions. An override may be followed by
one of the user's own: Hydra takes the last. They also carry the environment to Ray's workers, so
`VERL_PLATFORM=cpu` is all that the driver needs.
"""

import os
from collections.abc import Mapping

# Why each is there; those marked "needed" make a run fail or hang when they are left out.
ENVIRONMENT: dict[str, str] = {
    # The switch of the whole platform (needed).
    "VERL_PLATFORM": "cpu",
    # GiB of KV cache; without it vLLM takes half of the machine's memory.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Lets the engine run its one worker in its own process (with distributed_executor_backend=uni):
    # one process with 7 s of imports less, no message queue between the two at every token.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # vLLM compiles its sampler on first use even with enforce_eager: 10 s of C++ compiler.
    "TORCHDYNAMO_DISABLE": "1",
    # TransferQueue sets torch to 8 threads around every small tensor and warns when there are fewer
    # cores.
    "TQ_NUM_THREADS": "1",
    # Threads that wait for one another must sleep, not spin: other processes need the core. With
    # spinning threads and a busy machine a step was seen to take minutes.
    "OMP_WAIT_POLICY": "PASSIVE",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def cpu_env(threads: int | None = None) -> dict[str, str]:
    """Environment variables of the driver; a local Ray hands them to every process it starts.

    threads: torch threads of each process; by default half of the cores, because a rollout keeps
        the engine and several Python processes busy at once.
    """
    count = threads or max(1, len(os.sched_getaffinity(0)) // 2)
    return {**ENVIRONMENT, "OMP_NUM_THREADS": str(count)}


def cpu_overrides(
    *,
    threads: int | None = None,
    max_tokens: int = 2048,
    agent_workers: int = 1,
    reward_workers: int = 1,
    recompute_old_log_prob: bool = True,
    ray_temp_dir: str | None = None,
    env: Mapping[str, str] | None = None,
) -> list[str]:
    """Hydra overrides under which verl's PPO trainer runs on one machine without a GPU.

    threads: as in `cpu_env`.
    max_tokens: tokens of one micro-batch in the actor; at least the longest prompt plus response.
    agent_workers: processes that run agent loops.
    reward_workers: processes that run the reward function; 0 only for an agent loop that sets the
        reward itself.
    recompute_old_log_prob: False trusts the log probabilities that vLLM returned, which equal the
        actor's to 1e-7 when both are float32; it saves a forward pass and drops the metrics
        training/rollout_probs_diff_*.
    ray_temp_dir: a short path for Ray's files, for machines that share /tmp/ray.
    env: further environment variables of every Ray worker.
    """
    actor = "actor_rollout_ref.actor"
    rollout = "actor_rollout_ref.rollout"
    ray = "ray_kwargs.ray_init"
    engines = (f"{actor}.fsdp_config", "actor_rollout_ref.ref.fsdp_config")
    overrides = [
        # Ray schedules logical units: one GPU for the worker group; a CPU for each actor that asks
        # for one. With too few the run waits for ever without a word.
        "trainer.device=cpu",
        "trainer.nnodes=1",
        "trainer.n_gpus_per_node=1",
        f"+{ray}.num_gpus=1",
        f"{ray}.num_cpus=32",
        f"+{ray}.include_dashboard=False",
        # Each of these is a process that imports torch; a laptop has no use for more than one.
        "transfer_queue.backend.SimpleStorage.num_data_storage_units=1",
        f"{rollout}.agent.num_workers={agent_workers}",
        f"reward.num_workers={reward_workers}",
        "data.dataloader_num_workers=0",
        # FSDP1 asks for a CUDA device; flash attention and the packed layout made for it are
        # slower here than padding, at micro-batches of this size.
        f"{actor}.strategy=fsdp2",
        "actor_rollout_ref.model.use_remove_padding=False",
        "actor_rollout_ref.model.enable_gradient_checkpointing=False",
        "+actor_rollout_ref.model.override_config.attn_implementation=sdpa",
        f"{actor}.use_torch_compile=False",
        *(f"{engine}.use_torch_compile=False" for engine in engines),
        f"{actor}.use_dynamic_bsz=True",
        f"{actor}.ppo_max_token_len_per_gpu={max_tokens}",
        # float32 throughout: verl's default computes in bfloat16, which most CPUs emulate.
        *(
            f"+{engine}.mixed_precision.{kind}_dtype=fp32"
            for engine in engines
            for kind in ("param", "reduce", "buffer")
        ),
        f"{rollout}.name=vllm",
        f"{rollout}.dtype=float32",
        f"{rollout}.enforce_eager=True",
        # Nothing to free: weights and cache stay in memory, and sleeping is CUDA's.
        f"{rollout}.free_cache_engine=False",
        f"+{rollout}.enable_sleep_mode=False",
        f"{rollout}.tensor_model_parallel_size=1",
        f"+{rollout}.engine_kwargs.vllm.distributed_executor_backend=uni",
    ]
    if not recompute_old_log_prob:
        overrides.append("algorithm.rollout_correction.bypass_mode=True")
    if ray_temp_dir is not None:
        overrides.append(f"+{ray}._temp_dir={ray_temp_dir}")
    workers_env = {**cpu_env(threads), **(env or {})}
    overrides += [f"+{ray}.runtime_env.env_vars.{k}='{v}'" for k, v in workers_env.items()]
    return overrides


def main() -> None:
    """Print the overrides, one a line, as a shell takes them from `$(...)`."""
    print("\n".join(cpu_overrides()))


if __name__ == "__main__":
    main()
