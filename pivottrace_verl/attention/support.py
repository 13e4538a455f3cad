"""Which engines and layers can be captured.

Everything that cannot be captured is refused here, at engine start, with one sentence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch

from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.attention.keys import find_layout


@dataclass(frozen=True)
class TracedLayer:
    """One attention layer of the model that is captured."""

    index: int
    name: str
    module: Any
    group: int
    """The KV cache group whose block table serves it."""

    @property
    def n_heads(self) -> int:
        return int(self.module.impl.num_heads)

    @property
    def backend(self) -> str:
        return str(self.module.attn_backend.get_name())

    @property
    def isa(self) -> str:
        # From vLLM 0.29 on the metadata builder notes it on the layer.
        impl = self.module.impl
        return str(impl.isa if hasattr(impl, "isa") else self.module.isa)


def refuse(why: str) -> NoReturn:
    """Stop the engine: capture was asked for and cannot be had."""
    raise RuntimeError(
        f"Attention capture was asked for, but {why}; change that, or set PIVOTTRACE_DISABLE=1 to "
        f"run without capture."
    )


def check_engine(vllm_config: Any, runner: Any) -> None:
    """Refuse engines whose steps the hooks would misread."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    parallel = vllm_config.parallel_config
    if not isinstance(runner, GPUModelRunner):
        refuse(
            f"this engine uses the model runner {type(runner).__module__}.{type(runner).__name__} "
            f"and only vLLM's V1 runner is supported (VLLM_USE_V2_MODEL_RUNNER=0)"
        )
    if runner.device.type != "cpu":
        refuse(f"this engine runs on {runner.device.type} and only vLLM's CPU backend is supported")
    for name, value in (
        ("tensor parallelism", parallel.tensor_parallel_size),
        ("pipeline parallelism", parallel.pipeline_parallel_size),
        ("decode context parallelism", parallel.decode_context_parallel_size),
    ):
        if value > 1:
            refuse(f"this engine uses {name} ({value} ranks), which is not supported yet")
    if vllm_config.speculative_config is not None:
        refuse("this engine decodes speculatively, which is not supported yet")
    if runner.use_async_scheduling:
        refuse("this engine schedules asynchronously, which is not supported yet")
    if vllm_config.model_config.runner_type != "generate":
        refuse(f"this engine's runner is {vllm_config.model_config.runner_type!r}, not 'generate'")


def find_layers(
    vllm_config: Any,
    kv_cache_config: Any,
    config: CaptureConfig,
    problem: Callable[[str, Any, int], str | None] | None = None,
) -> list[TracedLayer]:
    """The layers to trace; refuses where one of them cannot be read, which `problem` says of a
    layer's name, module and KV cache group (None: what the CPU backend can read)."""
    from vllm.model_executor.layers.attention import Attention

    context = vllm_config.compilation_config.static_forward_context
    groups = {
        name: number
        for number, group in enumerate(kv_cache_config.kv_cache_groups)
        for name in group.layer_names
    }
    found: dict[int, TracedLayer] = {}
    others: list[str] = []
    for name, module in context.items():
        index = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if index is None or not isinstance(module, Attention) or name not in groups:
            others.append(f"{name} ({type(module).__name__})")
            continue
        found[index] = TracedLayer(index, name, module, groups[name])
    if not found:
        kinds = "; ".join(others[:3]) or "none"
        refuse(f"the model has no plain attention layer that can be read (it has {kinds})")
    problems = {
        index: problem(layer.name, layer.module, layer.group) if problem else _problem(layer)
        for index, layer in found.items()
    }
    readable = sorted(index for index, problem in problems.items() if problem is None)
    if config.layers is not None or not readable:
        for index in config.layers or sorted(found)[:1]:
            if problems.get(index) is not None:
                refuse(f"layer {index} {problems[index]}")
    chosen = [found[index] for index in config.choose_layers(readable)]
    if len({layer.group for layer in chosen}) > 1:
        refuse("the layers to trace lie in different KV cache groups; choose layers of one kind")
    if len({layer.n_heads for layer in chosen}) > 1:
        refuse("the layers to trace have different numbers of heads; choose layers of one kind")
    for position, layer in enumerate(chosen):
        config.choose_heads(layer.n_heads, position)
    return chosen


def _problem(layer: TracedLayer) -> str | None:
    """Why a layer cannot be read, or None."""
    impl = layer.module.impl
    if layer.backend != "CPU_ATTN":
        return f"uses the attention backend {layer.backend}, and only CPU_ATTN is supported"
    if layer.module.kv_cache.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"has a quantised KV cache ({layer.module.kv_cache.dtype}), which cannot be read"
    if impl.is_fp8_kv_cache:
        return f"has a quantised KV cache ({impl.kv_cache_dtype}), which cannot be read"
    if impl.sliding_window != -1:
        return f"attends to a sliding window of {impl.sliding_window} tokens, not supported yet"
    if impl.alibi_slopes is not None:
        return "uses ALiBi, which is not supported"
    if impl.sinks is not None:
        return "has learnt attention sinks, which are not supported yet"
    return None


def key_layout(layer: TracedLayer) -> str:
    """The layout of a layer's keys (`keys.LAYOUTS`), proved by reading back what was written."""
    module = layer.module
    layout = find_layout(module.kv_cache, partial(_write, module))
    if layout is None:
        refuse(
            f"the keys of layer {layer.index} cannot be read back from vLLM's cache, whose layout "
            f"for the instruction set {layer.isa!r} and {module.kv_cache.dtype} is not known here"
        )
    return layout


def _write(module: Any, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
    """Write keys the way the engine does."""
    module.impl.do_kv_cache_update(module, keys, values, module.kv_cache, slots)
