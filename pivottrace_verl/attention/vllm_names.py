"""Every private name of vLLM that the capture leans on, in one place.

`tests/plugin_contracts/test_vllm_names.py` checks each against the installed vLLM, so that an
upgrade that moved one fails there with a sentence and not in the middle of a run.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Name:
    """One private name: where it is, why it is needed, where upstream keeps it."""

    path: str
    """Module, colon, attribute; dataclass fields and annotated attributes count."""
    why: str
    upstream: str
    """File (and function) in vLLM's repository, version 0.28.0."""
    parameters: tuple[str, ...] = ()
    """First parameters, in this order, of a function."""
    instance: bool = False
    """True for an attribute that is only set on instances; the contract test reads the source of
    the class for `self.<name>`."""
    mentions: str = ""
    """What the source of a function must hold, as `ast.unparse` writes it."""
    assigns: tuple[str, ...] = ()
    """All statements of a function that give one variable a value, as `ast.unparse` writes them:
    another way to that value is a change."""
    versions: str = ""
    """Versions of vLLM it is for, as a specifier (">=0.28"); empty: all from 0.24 on."""


NAMES = (
    Name(
        "vllm.v1.worker.worker_base:WorkerWrapperBase.initialize_from_config",
        "the moment a worker has its KV cache, on every executor; the one class method wrapped",
        "vllm/v1/worker/worker_base.py",
        ("self", "kv_cache_configs"),
    ),
    Name(
        "vllm.v1.worker.worker_base:WorkerWrapperBase.global_rank",
        "which KV cache configuration is this worker's",
        "vllm/v1/worker/worker_base.py",
        instance=True,
    ),
    Name(
        "vllm.v1.worker.worker_base:WorkerWrapperBase.vllm_config",
        "parallelism, speculation and the layers by name",
        "vllm/v1/worker/worker_base.py",
        instance=True,
    ),
    Name(
        "vllm.v1.worker.cpu_worker:CPUWorker.model_runner",
        "the runner whose steps are followed",
        "vllm/v1/worker/cpu_worker.py (init_device)",
        instance=True,
    ),
    Name(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model",
        "wrapped: the tracker sees each step before the runner drops finished requests",
        "vllm/v1/worker/gpu_model_runner.py",
        ("self", "scheduler_output"),
    ),
    Name(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.requests",
        "block ids and output tokens of each request, by id",
        "vllm/v1/worker/gpu_model_runner.py",
        instance=True,
    ),
    Name(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.input_batch",
        "the requests of a step in batch order",
        "vllm/v1/worker/gpu_model_runner.py",
        instance=True,
    ),
    Name(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.use_async_scheduling",
        "asynchronous scheduling is refused",
        "vllm/v1/worker/gpu_model_runner.py",
        instance=True,
    ),
    Name(
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner.model",
        "its compute_logits gives the logits that choose each token",
        "vllm/v1/worker/cpu_model_runner.py (load_model)",
        instance=True,
    ),
    Name(
        "vllm.v1.worker.gpu_input_batch:InputBatch.req_ids",
        "batch order of the requests",
        "vllm/v1/worker/gpu_input_batch.py",
    ),
    Name(
        "vllm.v1.worker.gpu_input_batch:CachedRequestState.block_ids",
        "the KV slots of a request's tokens, per KV cache group",
        "vllm/v1/worker/gpu_input_batch.py",
    ),
    Name(
        "vllm.v1.worker.gpu_input_batch:CachedRequestState.output_token_ids",
        "how many tokens a request has generated",
        "vllm/v1/worker/gpu_input_batch.py",
    ),
    *(
        Name(
            f"vllm.v1.core.sched.output:SchedulerOutput.{field}",
            why,
            "vllm/v1/core/sched/output.py",
        )
        for field, why in (
            ("scheduled_new_reqs", "requests seen for the first time, with their sampling params"),
            ("scheduled_cached_reqs", "the other requests of a step"),
            ("num_scheduled_tokens", "counts the rows of stages that never see a token"),
            ("scheduled_spec_decode_tokens", "how many queries of a request choose a token"),
            ("finished_req_ids", "requests whose rows are read out and sent"),
            ("preempted_req_ids", "requests whose rows are read out before their blocks go"),
            ("total_num_scheduled_tokens", "an empty step has no rows"),
        )
    ),
    *(
        Name(
            f"vllm.v1.core.sched.output:NewRequestData.{field}", why, "vllm/v1/core/sched/output.py"
        )
        for field, why in (
            ("req_id", "the engine's id of a request"),
            ("prompt_token_ids", "the prompt's length"),
            ("sampling_params", "extra_args, through which a request opts in"),
            ("num_computed_tokens", "counts the rows of stages that never see a token"),
        )
    ),
    *(
        Name(
            f"vllm.v1.core.sched.output:CachedRequestData.{field}",
            "counts the rows of stages that never see a token",
            "vllm/v1/core/sched/output.py",
        )
        for field in ("req_ids", "resumed_req_ids", "num_computed_tokens", "num_output_tokens")
    ),
    Name(
        "vllm.distributed.parallel_state:get_tp_group",
        "which query heads this worker holds",
        "vllm/distributed/parallel_state.py",
    ),
    Name(
        "vllm.distributed.parallel_state:get_pp_group",
        "which stage this worker is; the stages tell each other of their layers over it",
        "vllm/distributed/parallel_state.py",
    ),
    *(
        Name(
            f"vllm.distributed.parallel_state:GroupCoordinator.{field}",
            why,
            "vllm/distributed/parallel_state.py",
        )
        for field, why in (
            ("rank_in_group", "the rank of a worker in its group"),
            ("world_size", "the number of workers in a group"),
            ("cpu_group", "the process group over which stages tell of their layers"),
        )
    ),
    Name(
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward",
        "wrapped on each traced layer's instance: queries, cache and metadata of a step",
        "vllm/v1/attention/backends/cpu_attn.py",
        ("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata"),
    ),
    Name(
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.do_kv_cache_update",
        "writes known keys at start, to prove that the cache is read as it is written",
        "vllm/v1/attention/backends/cpu_attn.py",
        ("self", "layer", "key", "value", "kv_cache", "slot_mapping"),
    ),
    *(
        Name(
            f"vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.{field}",
            why,
            "vllm/v1/attention/backends/cpu_attn.py",
            instance=True,
        )
        for field, why in (
            ("scale", "the softmax scale"),
            ("num_heads", "the number of query heads"),
            ("is_fp8_kv_cache", "a quantised cache is refused"),
            ("sliding_window", "how many keys a query sees; -1 means all"),
            ("logits_soft_cap", "the soft cap of the scores; 0 means none"),
            ("alibi_slopes", "ALiBi is refused"),
            ("sinks", "learnt sinks are refused"),
        )
    ),
    Name(
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.isa",
        "the instruction set whose key layout is read, for messages",
        "vllm/v1/attention/backends/cpu_attn.py",
        instance=True,
        versions="<0.29",
    ),
    Name(
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder._set_isa_to_layers",
        "the instruction set whose key layout is read, for messages",
        "vllm/v1/attention/backends/cpu_attn.py",
        mentions="layer.isa = self.isa",
        versions=">=0.29",
    ),
    *(
        Name(
            f"vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadata.{field}",
            why,
            "vllm/v1/attention/backends/cpu_attn.py",
        )
        for field, why in (
            ("num_actual_tokens", "tokens of a step without padding"),
            ("max_query_len", "1 in a pure decode step"),
            ("query_start_loc", "which tokens belong to which request"),
            ("seq_lens", "the position of each request's last token"),
            ("block_table", "the blocks that hold each request's keys"),
            ("slot_mapping", "the KV slot of each token, where its row is stored"),
        )
    ),
    Name(
        "vllm.model_executor.layers.attention:Attention",
        "the class of layers that can be traced",
        "vllm/model_executor/layers/attention/attention.py",
    ),
    *(
        Name(
            f"vllm.model_executor.layers.attention:Attention.{field}",
            why,
            "vllm/model_executor/layers/attention/attention.py",
            instance=True,
        )
        for field, why in (
            ("impl", "the backend's implementation, whose forward is wrapped"),
            ("kv_cache", "the layer's KV cache"),
            ("attn_backend", "the backend's name"),
        )
    ),
    Name(
        "vllm.config:CompilationConfig.static_forward_context",
        "the attention layers by name",
        "vllm/config/compilation.py",
    ),
    *(
        Name(f"vllm.v1.kv_cache_interface:{field}", why, "vllm/v1/kv_cache_interface.py")
        for field, why in (
            ("KVCacheConfig.num_blocks", "the number of KV slots"),
            ("KVCacheConfig.kv_cache_groups", "which block table serves which layer"),
            ("KVCacheGroupSpec.layer_names", "which block table serves which layer"),
            ("KVCacheGroupSpec.kv_cache_spec", "the block size of a group"),
            ("KVCacheSpec.block_size", "the block size of a group"),
            ("SlidingWindowSpec.sliding_window", "groups whose older keys are dropped are refused"),
        )
    ),
    *(
        Name(f"vllm.config:{field}", why, "vllm/config")
        for field, why in (
            ("VllmConfig.speculative_config", "speculative decoding other than ngram is refused"),
            ("SpeculativeConfig.method", "speculative decoding other than ngram is refused"),
            ("ParallelConfig.pipeline_parallel_size", "drafts in a pipeline are refused"),
            ("ParallelConfig.decode_context_parallel_size", "context parallelism is refused"),
            ("ParallelConfig.prefill_context_parallel_size", "context parallelism is refused"),
            ("ParallelConfig.world_size", "external launchers are refused"),
            ("ParallelConfig.nnodes", "engines on several machines are refused"),
            ("ParallelConfig.distributed_executor_backend", "external launchers are refused"),
        )
    ),
    Name(
        "vllm.config:ModelConfig.runner_type",
        "pooling engines are refused",
        "vllm/config/model.py (__post_init__)",
        instance=True,
    ),
    Name(
        "vllm.v1.engine.parallel_sampling:ParentRequest.get_child_info",
        "wrapped: gives each child of a request with n > 1 a key of its own",
        "vllm/v1/engine/parallel_sampling.py",
        ("self", "index"),
        mentions="return (child_req_id, self._get_child_sampling_params(index))",
    ),
    *(
        Name(
            f"vllm.v1.engine.{engine}.add_request",
            "each child of a request with n > 1 gets the parameters of `get_child_info`",
            f"vllm/v1/engine/{engine.partition(':')[0]}.py",
            mentions=f"request_id, child_params = {parent}.get_child_info(idx)",
        )
        for engine, parent in (
            ("llm_engine:LLMEngine", "parent_req"),
            ("async_llm:AsyncLLM", "parent_request"),
        )
    ),
    Name(
        "vllm.sampling_params:SamplingParams.extra_args",
        "how a request opts in",
        "vllm/sampling_params.py",
    ),
)
