"""Which engines and layers the kernel can capture, and where a layer's keys lie in vLLM's cache.

Everything else is refused at engine start with one sentence (`support.refuse`). Where keys lie
depends on vLLM's version and its backend, so the layout is proved: known keys are written the way
the engine writes them and read back through each view of `VIEWS`.

Axes: N keys, H_kv key heads, D head size.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from pivottrace_verl.attention.keys import StridedKeys
from pivottrace_verl.attention.support import (
    CHUNKED,
    TracedLayer,
    check_workers,
    chunked,
    refuse,
)

BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "CPU_ATTN")
PLAIN_CACHES = ("auto", "float32", "float16", "bfloat16")
FP8_CACHES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")
"""Modules of vLLM's V1 and V2 model runner; vLLM's CPU runner is a V1 runner."""


def check_device_engine(vllm_config: Any, runner: Any) -> None:
    """Refuse engines whose steps the device hooks would misread."""
    if not any(base.__module__ in RUNNERS for base in type(runner).__mro__):
        refuse(
            f"this engine uses the model runner {type(runner).__module__}.{type(runner).__name__}, "
            f"which is not known here"
        )
    if runner.device.type not in ("cuda", "cpu"):
        refuse(f"this engine runs on {runner.device.type}, which is not supported")
    if find_spec("triton") is None:
        refuse("Triton is not installed")
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    check_workers(parallel)
    if parallel.pipeline_parallel_size > 1:
        refuse(
            f"this engine uses pipeline parallelism ({parallel.pipeline_parallel_size} ranks), "
            f"which is not supported on GPUs yet"
        )
    # From vLLM 0.29 on each rank may be given the logits of its own part of the batch.
    if getattr(parallel, "enable_batch_sharded_sampling", False):
        refuse(
            "each rank of this engine samples a part of the batch (enable_batch_sharded_sampling), "
            "so none sees all logits"
        )
    if parallel.use_ubatching:
        refuse("this engine splits its batches in two (DBO), which is not supported")
    if vllm_config.speculative_config is not None:
        refuse("this engine decodes speculatively, which is not supported on GPUs yet")
    if vllm_config.model_config.runner_type != "generate":
        refuse(f"this engine's runner is {vllm_config.model_config.runner_type!r}, not 'generate'")
    if cache.kv_sharing_fast_prefill:
        refuse("this engine skips layers in prefill (kv_sharing_fast_prefill)")
    # Until vLLM 0.28 scales could be found in the first step.
    if getattr(cache, "calculate_kv_scales", False):
        refuse("this engine finds the scales of its FP8 cache as it runs (calculate_kv_scales)")


def device_problem(kv_cache_config: Any) -> Callable[[str, Any, int], str | None]:
    """Why a layer cannot be read by the kernel, or None: for `support.find_layers`."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    def problem(name: str, module: Any, group: int) -> str | None:
        impl, backend = module.impl, str(module.attn_backend.get_name())
        spec = kv_cache_config.kv_cache_groups[group].kv_cache_spec
        spec = getattr(spec, "kv_cache_specs", {}).get(name, spec)
        cache_dtype = module.kv_cache_dtype
        if backend not in BACKENDS:
            return (
                f"uses the attention backend {backend}, and only {', '.join(BACKENDS[:3])} "
                f"are supported on GPUs"
            )
        if cache_dtype not in PLAIN_CACHES and cache_dtype not in FP8_CACHES:
            return f"has a quantised KV cache ({cache_dtype}), which cannot be read"
        if cache_dtype in FP8_CACHES and backend == "CPU_ATTN":
            return f"has a quantised KV cache ({cache_dtype}), which cannot be read"
        if cache_dtype == "fp8" and platform_fp8() not in FP8_CACHES.values():
            return f"has an FP8 cache in the format {platform_fp8()}, which is not supported"
        if cache_dtype in FP8_CACHES and not device_reads_fp8():
            return (
                f"has an FP8 KV cache ({cache_dtype}), whose keys the kernel reads on GPUs of "
                f"compute capability 8.9 and later only"
            )
        if chunked(module):
            return CHUNKED
        if not isinstance(spec, FullAttentionSpec) or hasattr(spec, "rswa_window"):
            return (
                f"has a KV cache that forgets ({type(spec).__name__}), so its rows would be lost "
                f"before they are read"
            )
        if impl.alibi_slopes is not None:
            return "uses ALiBi, which is not supported"
        if module.attn_type != "decoder":  # an enumeration of strings
            return f"is an attention layer of type {module.attn_type}, not of a decoder"
        if module.kv_sharing_target_layer_name is not None:
            return f"has no keys of its own, but those of {module.kv_sharing_target_layer_name}"
        return None

    return problem


def platform_fp8() -> torch.dtype:
    from vllm.platforms import current_platform

    dtype: torch.dtype = current_platform.fp8_dtype()
    return dtype


def device_reads_fp8() -> bool:
    """Triton converts FP8 numbers for NVIDIA GPUs from Ada (8.9) on."""
    from vllm.platforms import current_platform

    return bool(current_platform.has_device_capability(89))


def _halves(cache: torch.Tensor) -> torch.Tensor | None:
    """[blocks, 2, block_size, H_kv, D]: vLLM 0.24."""
    return cache[:, 0] if cache.dim() == 5 and cache.shape[1] == 2 else None


def _joined(cache: torch.Tensor) -> torch.Tensor | None:
    """[blocks, H_kv, block_size, 2 D], in any order of memory: vLLM 0.28 and later."""
    if cache.dim() != 4:
        return None
    return cache[..., : cache.shape[3] // 2].transpose(1, 2)


def _columns(cache: torch.Tensor) -> torch.Tensor | None:
    """The CPU backend's `columns` of `keys`: [blocks, H_kv, D, block_size] and the values."""
    if cache.dim() != 4 or not cache.is_contiguous():
        return None
    n_blocks, kv_heads, block_size, double = cache.shape
    steps = (kv_heads * block_size * double, 1, block_size * double, block_size)
    return cache.as_strided((n_blocks, block_size, kv_heads, double // 2), steps)


VIEWS = {"halves": _halves, "joined": _joined, "columns": _columns}
"""The keys [blocks, block_size, H_kv, D] as views of vLLM's cache of a layer."""


def layer_keys(layer: TracedLayer, layout: str) -> StridedKeys:
    """A layer's keys in place; `layout` is one of `VIEWS`, as `prove_layout` found it."""
    module = layer.module
    cache = module.kv_cache
    fp8 = FP8_CACHES.get(module.kv_cache_dtype)
    if fp8 is not None:
        cache = cache.view(fp8)
    view = VIEWS[layout](cache)
    assert view is not None
    return StridedKeys(view, None if fp8 is None else module._k_scale)


def prove_layout(layer: TracedLayer, dtype: torch.dtype) -> str:
    """The layout of a layer's cache, proved by reading back what was written; refuses if none fits.

    `dtype` is the model's, in which keys are written. Runs before the first request, and leaves the
    cache as it was.
    """
    module = layer.module
    cache = module.kv_cache
    for layout, view in VIEWS.items():
        if view(cache) is not None and _reads_back(layer, layout, dtype):
            return layout
    refuse(
        f"the keys of layer {layer.index} cannot be read back from vLLM's cache, whose layout "
        f"{list(cache.shape)} of {module.kv_cache_dtype} for the backend {layer.backend} is not "
        f"known here"
    )


@torch.inference_mode()
def _reads_back(layer: TracedLayer, layout: str, dtype: torch.dtype) -> bool:
    """True when keys that the engine's own code wrote are found at their slots."""
    module, keys = layer.module, layer_keys(layer, layout)
    n_blocks, block_size, kv_heads, size = keys.view.shape
    device = keys.view.device
    slots = [1, block_size - 1, (n_blocks - 1) * block_size + block_size // 2]
    blocks = sorted({slot // block_size for slot in slots})
    # As bytes: not every operation is there for FP8.
    raw = module.kv_cache.view(torch.uint8)
    before = [raw[block].clone() for block in blocks]
    generator = torch.Generator().manual_seed(0)
    written = [
        torch.randn(len(slots), kv_heads, size, generator=generator).to(device, dtype)
        for _ in range(2)
    ]
    where = torch.tensor(slots, dtype=torch.int64, device=device)
    module.impl.do_kv_cache_update(module, *written, module.kv_cache, where)
    found = torch.stack([keys.view[s // block_size, s % block_size].float() for s in slots])
    for block, content in zip(blocks, before, strict=True):
        raw[block].copy_(content)
    expected = written[0].float()
    if keys.scale is None:
        # The cache may be of another 16-bit format than the model.
        return bool(torch.equal(found, written[0].to(keys.view.dtype).float()))
    # Half a step of the format: 3 bits of mantissa, or 2.
    step = 2**-3 if keys.view.dtype == torch.float8_e4m3fn else 2**-2
    return bool(torch.allclose(found * keys.scale, expected, rtol=step, atol=step / 32))
