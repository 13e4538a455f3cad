"""Which engines and layers can be captured.

Everything that cannot be captured is refused here, at engine start, with one sentence.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch

from pivottrace_verl.attention.config import WITHOUT_CAPTURE, CaptureConfig
from pivottrace_verl.attention.keys import find_layout
from pivottrace_verl.attention.parts import Place
from pivottrace_verl.attention.reference import ScoreRule


@dataclass(frozen=True)
class TracedLayer:
    """One attention layer of the model that is captured."""

    index: int
    name: str
    module: Any
    """None where another stage of the pipeline holds it."""
    group: int
    """The KV cache group whose block table serves it."""
    n_heads: int
    """Query heads on each tensor rank."""
    stage: int = 0
    """The pipeline stage that holds it."""

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
        f"Attention capture was asked for, but {why}; change that; {WITHOUT_CAPTURE}."
    )


def check_workers(parallel: Any) -> None:
    """Refuse engines whose workers cannot all be heard, or share a request's keys."""
    for name, value in (
        ("decode context parallelism", parallel.decode_context_parallel_size),
        ("prefill context parallelism", parallel.prefill_context_parallel_size),
    ):
        if value > 1:
            refuse(f"this engine uses {name} ({value} ranks), which is not supported yet")
    if parallel.nnodes > 1:
        refuse(
            f"this engine spans {parallel.nnodes} machines, and traces do not leave the machine of "
            f"the worker that captured them"
        )
    if parallel.world_size > 1 and parallel.distributed_executor_backend == "external_launcher":
        refuse(
            "the workers of this engine were launched one by one (external_launcher), each with a "
            "receiver of its own, which is not supported"
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
    check_workers(parallel)
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method != "ngram":
        refuse(
            f"this engine drafts tokens by {speculative.method!r}, and only 'ngram' is supported"
        )
    if speculative is not None and parallel.pipeline_parallel_size > 1:
        refuse("this engine drafts tokens in a pipeline of stages, which is not supported yet")
    if runner.use_async_scheduling:
        refuse("this engine schedules asynchronously, which is not supported yet")
    if vllm_config.model_config.runner_type != "generate":
        refuse(f"this engine's runner is {vllm_config.model_config.runner_type!r}, not 'generate'")


@dataclass(frozen=True)
class _Seen:
    """What the stages of a pipeline tell each other of a layer."""

    name: str
    group: int
    n_heads: int
    sees_all: bool
    """False where a window slides."""
    problem: str | None


Survey = dict[int, _Seen]
"""The layers of one stage that could be traced, by index."""


def own_place() -> Place:
    """Where this worker stands in its engine."""
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group

    tensor, pipeline = get_tp_group(), get_pp_group()
    return Place(
        tensor.rank_in_group, tensor.world_size, pipeline.rank_in_group, pipeline.world_size
    )


def gather_stages(own: Survey) -> list[Survey]:
    """The surveys of all stages; every worker of the pipeline must call it."""
    from vllm.distributed.parallel_state import get_pp_group

    group = get_pp_group()
    surveys: list[Survey] = [{} for _ in range(group.world_size)]
    torch.distributed.all_gather_object(surveys, own, group=group.cpu_group)
    return surveys


def find_layers(
    vllm_config: Any,
    kv_cache_config: Any,
    config: CaptureConfig,
    place: Place | None = None,
    gather: Callable[[Survey], list[Survey]] = gather_stages,
    problem: Callable[[str, Any, int], str | None] | None = None,
) -> list[TracedLayer]:
    """The layers to trace, those of other stages included; refuses, on every worker alike, where
    one of them cannot be read, which `problem` says of a layer's name, module and KV cache group
    (None: what the CPU backend can read)."""
    place, problem = place or Place(), problem or cpu_problem(kv_cache_config)
    found, others = _own_layers(vllm_config, kv_cache_config)
    survey = {
        index: _Seen(
            name,
            group,
            int(module.impl.num_heads),
            sliding_window(module.impl) is None,
            problem(name, module, group),
        )
        for index, (name, module, group) in found.items()
    }
    seen: dict[int, tuple[int, _Seen]] = {
        index: (stage, one)
        for stage, stage_survey in enumerate(gather(survey) if place.n_stages > 1 else [survey])
        for index, one in stage_survey.items()
    }
    if not seen:
        kinds = "; ".join(others[:3]) or "none"
        refuse(f"the model has no plain attention layer that can be read (it has {kinds})")
    problems = {index: one.problem for index, (_, one) in seen.items()}
    readable = sorted(index for index, why in problems.items() if why is None)
    if config.layers is not None or not readable:
        for index in config.layers or sorted(seen)[:1]:
            if problems.get(index) is not None:
                refuse(f"layer {index} {problems[index]}")
    far = [index for index in readable if seen[index][1].sees_all]
    available = far if config.layers is None and far else readable
    chosen = []
    for index in config.choose_layers(available):
        stage, one = seen[index]
        module = found[index][1] if stage == place.stage else None
        chosen.append(TracedLayer(index, one.name, module, one.group, one.n_heads, stage))
    if len({layer.group for layer in chosen}) > 1:
        refuse("the layers to trace lie in different KV cache groups; choose layers of one kind")
    if len({layer.n_heads for layer in chosen}) > 1:
        refuse("the layers to trace have different numbers of heads; choose layers of one kind")
    for position, layer in enumerate(chosen):
        config.choose_heads(layer.n_heads * place.tensor_size, position)
    return chosen


def find_witness(vllm_config: Any, kv_cache_config: Any, traced: TracedLayer) -> TracedLayer:
    """Where a worker has the logits and no traced layer: one whose steps are followed instead, in
    the KV cache group of a traced one."""
    found, _ = _own_layers(vllm_config, kv_cache_config)
    for index, (name, module, group) in found.items():
        if group == traced.group:
            return TracedLayer(index, name, module, group, traced.n_heads)
    refuse("the last stage of the pipeline has no attention layer of the traced kind")


def _own_layers(
    vllm_config: Any, kv_cache_config: Any
) -> tuple[dict[int, tuple[str, Any, int]], list[str]]:
    """(name, module, KV cache group) of this worker's plain attention layers by index, and the
    names of its other layers."""
    from vllm.model_executor.layers.attention import Attention

    groups = {
        name: number
        for number, group in enumerate(kv_cache_config.kv_cache_groups)
        for name in group.layer_names
    }
    found: dict[int, tuple[str, Any, int]] = {}
    others: list[str] = []
    for name, module in vllm_config.compilation_config.static_forward_context.items():
        index = next((int(part) for part in name.split(".") if part.isdigit()), None)
        if index is None or not isinstance(module, Attention) or name not in groups:
            others.append(f"{name} ({type(module).__name__})")
            continue
        found[index] = (name, module, groups[name])
    return found, others


def cpu_problem(kv_cache_config: Any) -> Callable[[str, Any, int], str | None]:
    """Why a layer cannot be read on the CPU backend, or None: for `find_layers`."""
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    def problem(name: str, module: Any, group: int) -> str | None:
        impl, backend = module.impl, str(module.attn_backend.get_name())
        if backend != "CPU_ATTN":
            return f"uses the attention backend {backend}, and only CPU_ATTN is supported"
        if module.kv_cache.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"has a quantised KV cache ({module.kv_cache.dtype}), which cannot be read"
        if impl.is_fp8_kv_cache:
            return f"has a quantised KV cache ({impl.kv_cache_dtype}), which cannot be read"
        if impl.alibi_slopes is not None:
            return "uses ALiBi, which is not supported"
        if chunked(module):
            return CHUNKED
        if impl.sinks is not None:
            return "has learnt attention sinks, which are not supported yet"
        if isinstance(kv_cache_config.kv_cache_groups[group].kv_cache_spec, SlidingWindowSpec):
            return (
                f"attends to a sliding window of {sliding_window(impl)} tokens and vLLM drops its "
                f"older keys, and with them the rows; an engine of a model that has other layers "
                f"too keeps them with disable_hybrid_kv_cache_manager=True"
            )
        return None

    return problem


CHUNKED = "attends within chunks of its context (attention_chunk_size), which is not supported"


def chunked(module: Any) -> bool:
    """True for a layer of local attention in chunks, as Llama 4 has them; where its cache keeps
    every key (disable_hybrid_kv_cache_manager) nothing else tells it from a full one."""
    return getattr(module, "attention_chunk_size", None) is not None


def sliding_window(impl: Any) -> int | None:
    """Keys a query sees, its own included; None for all. GPU backends keep (window - 1, 0) or
    (-1, -1), the CPU backend keeps the window or -1."""
    window = impl.sliding_window
    if window is None or isinstance(window, int):
        return None if window is None or window < 0 else window
    return None if window[0] < 0 else int(window[0]) + 1


def score_rule(impl: Any) -> ScoreRule:
    """The layer's; learnt sinks stay the tensor that vLLM keeps, so that new weights count."""
    return ScoreRule(float(impl.scale), float(impl.logits_soft_cap or 0.0), impl.sinks)


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
