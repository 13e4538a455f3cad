"""Every private name of verl that the training room leans on, in one place.

`tests/plugin_contracts/test_training_names.py` checks each against the installed verl, so that an
upgrade that moved one fails there with a sentence and not in the middle of a run.
"""

from __future__ import annotations

from dataclasses import dataclass

VERL = "0.9.1"


@dataclass(frozen=True)
class Name:
    """One private name."""

    path: str
    """Module, colon, attribute."""
    why: str
    parameters: tuple[str, ...] | None = None
    """Parameters that must be there, in this order; others may follow. None: do not matter."""


_WORKER = "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopWorkerTQ.__ray_metadata__.modified_class"
_TRAINER = "verl.trainer.ppo.v1.trainer_base:PPOTrainer"
_CLIENTS = "verl.workers.rollout.llm_server"
_SERVER = "verl.workers.rollout.vllm_rollout.vllm_async_server"

NAMES = (
    Name(
        f"{_WORKER}._run_prompt",
        "the group of a prompt is opened and closed around it",
        ("self", "prompt", "sampling_params", "trajectory", "trace"),
    ),
    Name(
        f"{_WORKER}._run_agent_loop",
        "a request opts in to capture and gets its seed there",
        ("self", "sampling_params", "trajectory", "agent_name", "trace"),
    ),
    Name(
        f"{_WORKER}._agent_loop_postprocess",
        "the verdict is put in before verl publishes the rollout",
        ("self", "output", "validate"),
    ),
    Name(
        f"{_WORKER}._compute_score",
        "scores a rollout in verl's reward workers; skipped by verl where a reward is set",
        ("self", "outputs", "kwargs"),
    ),
    Name(
        "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopManagerTQ",
        "starts `agent_loop_workers_class`",
    ),
    Name(f"{_TRAINER}._init_dataloader", "the sampler is replaced after it", ("self",)),
    Name(
        f"{_TRAINER}._compute_advantage",
        "advantages are scaled by route after it",
        ("self", "batch", "metrics"),
    ),
    Name(f"{_TRAINER}.prepare_step", "labels that arrived are taken in before it", ("self",)),
    Name(
        f"{_TRAINER}._fetch_one_gen_batch",
        "draws from `train_dataloader_it`, and makes it where it is None",
        ("self",),
    ),
    Name(f"{_TRAINER}.step", "records are read at its end", ("self", "metrics", "timing_raw")),
    Name(f"{_TRAINER}.on_init_end", "the poll interval is set after it", ("self",)),
    Name(
        f"{_TRAINER}.on_train_begin",
        "the asynchronous trainers draw their first prompts in it",
        ("self",),
    ),
    Name(f"{_TRAINER}.fit", "the processes are watched around it", ("self", "agent_loop_manager")),
    Name(f"{_TRAINER}.get_llm_client", "returns the client that gathers traces", ("self",)),
    Name(f"{_TRAINER}.get_reward_handles", "the reward workers are watched", ("self",)),
    Name(f"{_TRAINER}._rollout_server_managers", "their servers are watched", ("self",)),
    Name(
        "verl.trainer.ppo.v1.trainer_base:TRAINER_REGISTRY",
        "the classes behind the trainer modes are replaced in the task runner's process",
    ),
    Name("verl.trainer.ppo.v1.trainer_sync:PPOTrainerSync", "a trainer that is extended"),
    Name(
        "verl.trainer.ppo.v1.trainer_colocate_async:PPOTrainerColocateAsync.get_llm_client",
        "a trainer that is extended; its client is that of `llm_server_manager`",
        ("self",),
    ),
    Name(
        "verl.trainer.ppo.v1.trainer_separate_async:PPOTrainerSeparateAsync.get_llm_client",
        "a trainer that is extended; its client is that of `standalone_server_manager`",
        ("self",),
    ),
    Name(
        f"{_CLIENTS}:LLMServerManager.get_client",
        "makes a client of our class",
        ("self", "client_cls"),
    ),
    Name(f"{_CLIENTS}:LLMServerManager.get_replicas", "their servers are watched", ("self",)),
    Name(
        f"{_CLIENTS}:LLMServerClient.generate",
        "one engine request; its trace is taken out of the answer",
        ("self", "request_id", "prompt_ids", "sampling_params"),
    ),
    Name(
        f"{_CLIENTS}:FullyAsyncLLMServerClient.generate",
        "calls the next class's `generate` for each request, further arguments passed on, until "
        "one is not aborted",
        ("self", "request_id", "prompt_ids", "sampling_params"),
    ),
    Name(
        "verl.experimental.agent_loop.agent_loop:AgentLoopManager._init_agent_loop_workers",
        "starts `agent_loop_workers`, which are watched",
        ("self",),
    ),
    Name(
        "verl.trainer.main_ppo:TaskRunnerV1.__ray_metadata__.modified_class.run",
        "trainer and replica are swapped in before it",
        ("self", "config"),
    ),
    Name("verl.trainer.main_ppo:run_ppo", "starts the job", ("config", "task_runner_class")),
    Name(
        "verl.workers.rollout.replica:RolloutReplicaRegistry.register",
        "the class behind the rollout name vllm is replaced in the task runner's process",
        ("name", "loader"),
    ),
    Name(f"{_SERVER}:vLLMReplica.__init__", "sets `server_class`, which is replaced after it"),
    Name(f"{_SERVER}:vLLMHttpServer.launch_server", "the receiver starts before the engine"),
    Name(
        f"{_SERVER}:vLLMHttpServer.generate",
        "the trace is awaited after it",
        ("self", "prompt_ids", "sampling_params", "request_id"),
    ),
    Name(
        "verl.utils.dataset.rl_dataset:collate_fn",
        "the dataloader is rebuilt with it",
        ("data_list",),
    ),
    Name(
        "verl.trainer.ppo.v1.replay_buffer:ReplayBuffer._wait_for_next_poll",
        "sleeps `poll_interval`, shortened on small machines; the wait is bounded around it",
        ("self", "partition_id", "last_debug_time"),
    ),
    Name(
        "verl.trainer.ppo.v1.replay_buffer:ReplayBuffer._clear_groups",
        "groups that are not trained on are looked at before they go",
        ("self", "partition_id", "uids"),
    ),
    Name(
        "verl.trainer.ppo.v1.replay_buffer:ReplayBuffer.sample",
        "prompts without a rollout are counted in what it returns",
        ("self", "global_steps", "partition_id", "batch_size"),
    ),
    Name("vllm.v1.engine.async_llm:AsyncLLM.errored", "says that the engine of a server is dead"),
)
