"""Every private name of vLLM that the capture on GPUs leans on, besides those of `vllm_names`.

`tests/plugin_contracts/test_vllm_sources.py` reads them in the installed vLLM, and in unpacked
wheels of other versions, without importing anything: most of these modules need a GPU's libraries.
"""

from dataclasses import replace

from pivottrace_verl.attention.vllm_names import Name

_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
_BACKENDS = "vllm.v1.attention.backends"
_IMPLS = {
    "FLASH_ATTN": ("flash_attn", "FlashAttention"),
    "FLASHINFER": ("flashinfer", "FlashInfer"),
    "TRITON_ATTN": ("triton_attn", "TritonAttention"),
}
_LOGITS = "logits = self.model.compute_logits(sample_hidden_states)"
_FORWARD = ("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata")
_UPDATE = ("self", "layer", "key", "value", "kv_cache", "slot_mapping")


def _file(path: str) -> str:
    return path.partition(":")[0].replace(".", "/")


def _names(owner: str, **whys: str) -> tuple[Name, ...]:
    return tuple(Name(f"{owner}.{name}", why, _file(owner)) for name, why in whys.items())


def _on_instances(owner: str, **whys: str) -> tuple[Name, ...]:
    return tuple(replace(name, instance=True) for name in _names(owner, **whys))


def _runner(owner: str) -> tuple[Name, ...]:
    return (
        Name(
            f"{owner}.execute_model",
            "wrapped: the tracker sees each step before the runner acts on it",
            _file(owner),
            ("self", "scheduler_output"),
        ),
        Name(f"{owner}._dummy_run", "wrapped: dummy batches write no rows", _file(owner)),
        *_on_instances(
            owner,
            device="where the store is made",
            model="its compute_logits gives the logits that choose each token",
            max_num_reqs="the most requests of a batch, graphs' padding included",
            model_config="the number format of the model",
            cache_config="what of the device's memory is vLLM's",
            attn_groups="the builders whose common metadata is kept for FlashInfer",
        ),
    )


def _backend(name: str, module: str, prefix: str) -> tuple[Name, ...]:
    path = f"{_BACKENDS}.{module}"
    update = f"{path}:{prefix}Impl.do_kv_cache_update"
    halves = "kv_cache[:, 0]" if name == "FLASHINFER" else "kv_cache.unbind(1)"
    joined = "kv_cache.transpose(1, 2).split(self.head_size, dim=-1)"
    why = "writes known keys at start, to prove where keys lie: "
    return (
        Name(
            f"{path}:{prefix}Backend.get_name",
            "the backend's name",
            _file(path),
            mentions=f"'{name}'",
        ),
        Name(f"{path}:{prefix}Impl.forward", "wrapped on each traced layer", _file(path), _FORWARD),
        Name(
            update, f"{why}view `halves`", _file(path), _UPDATE, mentions=halves, versions="<0.28"
        ),
        Name(
            update, f"{why}view `joined`", _file(path), _UPDATE, mentions=joined, versions=">=0.28"
        ),
        *_on_instances(
            f"{path}:{prefix}Impl",
            scale="the softmax scale",
            num_heads="the number of query heads",
            sliding_window="(window - 1, 0), or (-1, -1) for none",
            logits_soft_cap="the soft cap of the scores; 0 or None for none",
            alibi_slopes="ALiBi is refused",
            sinks="learnt sinks join the softmax",
        ),
    )


_BATCH = {
    "query_start_loc": "which tokens belong to which request",
    "seq_lens": "the position of each request's last token",
    "slot_mapping": "the KV slot of each token, where its row is stored",
}

DEVICE_NAMES = (
    *_runner(_V1),
    *_runner(_V2),
    Name(
        f"{_V1}._prepare_inputs",
        "wrapped: from here on the batch's order is settled",
        _file(_V1),
        ("self", "scheduler_output"),
    ),
    Name(f"{_V1}.input_batch", "the batch's order", _file(_V1), instance=True),
    Name(
        f"{_V1}.execute_model",
        "logits are computed outside of the graph, a row a request",
        _file(_V1),
        # The last two where a pipeline's stages all sample, which is refused.
        assigns=(_LOGITS, "logits = None", "logits = broadcasted['logits']"),
    ),
    Name(
        f"{_V2}.prepare_inputs",
        "wrapped: returns the batch in its order",
        _file(_V2),
        ("self", "scheduler_output"),
    ),
    Name(
        f"{_V2}.execute_model",
        "the runner's own dummy runs are told apart",
        _file(_V2),
        ("self", "scheduler_output", "intermediate_tensors", "dummy_run"),
    ),
    Name(
        f"{_V2}.sample",
        "logits are computed outside of the graph, a row a request",
        _file(_V2),
        assigns=(_LOGITS,),
        versions="<0.29",
    ),
    Name(
        f"{_V2}.sample",
        "logits are computed outside of the graph, a row a request",
        _file(_V2),
        # The last two with batch-sharded sampling, which is refused.
        assigns=(
            _LOGITS,
            "logits = all_to_all_logits(local_logits, shard_metadata)",
            "logits = logits[:, :self.vocab_size]",
        ),
        versions=">=0.29",
    ),
    *_names("vllm.v1.worker.gpu.input_batch:InputBatch", req_ids="the batch's order"),
    Name(
        "vllm.v1.executor.abstract:Executor.compile_or_warm_up_model",
        "graphs are captured in a call of their own, after the hooks were put",
        "vllm/v1/executor/abstract.py",
        mentions="'compile_or_warm_up_model'",
        versions=">=0.28",
    ),
    Name(
        "vllm.v1.executor.abstract:Executor.initialize_from_config",
        "graphs are captured after the hooks were put",
        "vllm/v1/executor/abstract.py",
        mentions="'compile_or_warm_up_model'",
        versions="<0.28",
    ),
    Name(
        "vllm.model_executor.layers.attention.attention:unified_attention_with_output",
        "every traced layer's attention goes through its implementation's forward",
        "vllm/model_executor/layers/attention/attention.py",
        mentions="self.impl.forward(self, query, key, value, kv_cache, attn_metadata,",
    ),
    Name(
        "vllm.model_executor.layers.attention.attention:set_default_quant_scales",
        "the scales of FP8 keys and queries stay in buffers",
        "vllm/model_executor/layers/attention/attention.py",
        mentions="register_buffer('_k_scale'",
    ),
    *_on_instances(
        "vllm.model_executor.layers.attention.attention:Attention",
        kv_cache_dtype="the format of the cache",
        attn_type="layers of encoders are refused",
        kv_sharing_target_layer_name="layers without keys of their own are refused",
    ),
    *(name for backend, (mod, prefix) in _IMPLS.items() for name in _backend(backend, mod, prefix)),
    *_names(f"{_BACKENDS}.flash_attn:FlashAttentionMetadata", **_BATCH, block_table="the blocks"),
    *_names(f"{_BACKENDS}.triton_attn:TritonAttentionMetadata", **_BATCH, block_table="the blocks"),
    *_names(
        "vllm.v1.attention.backend:CommonAttentionMetadata",
        **_BATCH,
        block_table_tensor="the blocks that hold each request's keys",
    ),
    Name(
        f"{_BACKENDS}.flashinfer:FlashInferMetadataBuilder.build",
        "wrapped: its metadata has no block table",
        "vllm/v1/attention/backends/flashinfer.py",
        ("self", "common_prefix_len", "common_attn_metadata"),
    ),
    *_names(
        "vllm.v1.worker.utils:AttentionGroup",
        layer_names="which builders serve a layer",
        metadata_builders="which builders serve a layer",
    ),
    *_names(
        "vllm.v1.core.sched.output:SchedulerOutput",
        scheduled_cached_reqs="requests that go on",
        num_scheduled_tokens="how far each request is computed",
    ),
    *_names(
        "vllm.v1.core.sched.output:CachedRequestData",
        req_ids="requests that go on",
        resumed_req_ids="requests whose blocks are all new",
        new_block_ids="where their next rows are",
        num_computed_tokens="how far each request is computed",
        num_output_tokens="tokens that a resumed request kept",
    ),
    *_names(
        "vllm.v1.core.sched.output:NewRequestData",
        block_ids="where a request's rows are",
        num_computed_tokens="how far it is computed",
        prefill_token_ids="tokens that a request kept which the V2 runner is told to resume",
    ),
    Name(
        "vllm.v1.core.sched.output:SchedulerOutput.block_table_updates",
        "requests whose blocks were moved",
        "vllm/v1/core/sched/output.py",
        versions=">=0.31",
    ),
    *_names(
        "vllm.config.parallel:ParallelConfig",
        prefill_context_parallel_size="context parallelism is refused",
        use_ubatching="DBO is refused",
        nnodes="engines that span machines are refused",
        distributed_executor_backend="workers launched one by one are refused",
    ),
    Name(
        "vllm.config.parallel:ParallelConfig.enable_batch_sharded_sampling",
        "ranks that see the logits of a part of the batch are refused",
        "vllm/config/parallel.py",
        versions=">=0.29",
    ),
    *_on_instances(
        "vllm.model_executor.layers.attention.chunked_local_attention:ChunkedLocalAttention",
        attention_chunk_size="layers that attend within chunks are refused",
    ),
    *_names(
        "vllm.config.cache:CacheConfig",
        kv_sharing_fast_prefill="skipped layers are refused",
        gpu_memory_utilization="what of the device's memory is vLLM's",
        kv_cache_memory_bytes="where it is set the utilisation counts for nothing",
    ),
    *_names(
        "vllm.v1.kv_cache_interface:UniformTypeKVCacheSpecs",
        kv_cache_specs="the layers' own kinds of cache",
    ),
    Name(
        "vllm.v1.kv_cache_interface:FullAttentionSpec",
        "caches that keep every key",
        "vllm/v1/kv_cache_interface.py",
    ),
    Name(
        "vllm.v1.kv_cache_interface:RSWASpec.rswa_window",
        "the one full cache that forgets",
        "vllm/v1/kv_cache_interface.py",
        versions=">=0.28",
    ),
    Name(
        "vllm.platforms.interface:Platform.fp8_dtype",
        "the format of an FP8 cache",
        "vllm/platforms/interface.py",
    ),
    Name(
        "vllm.platforms.interface:Platform.has_device_capability",
        "FP8 keys are refused where Triton does not convert them",
        "vllm/platforms/interface.py",
        ("cls", "capability"),
    ),
)
