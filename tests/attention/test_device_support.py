"""What the device path cannot serve stops the engine at start, with a sentence that says why."""

from types import SimpleNamespace

import pytest
import torch

from pivottrace_verl.attention import device_layers, vllm_hooks
from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.attention.device_layers import check_device_engine, device_problem
from pivottrace_verl.attention.support import find_layers

pytestmark = pytest.mark.vllm


class V1Runner:
    __module__ = device_layers.RUNNERS[0]


class V2Runner:
    __module__ = device_layers.RUNNERS[1]


def make_engine(**changes):
    """(vllm_config, runner) of an engine that can be captured, then changed."""
    runner = type("Runner", (changes.pop("runner", V1Runner),), {})()
    runner.device = torch.device(changes.pop("device", "cuda"))
    parallel = {
        name: changes.pop(name, 1)
        for name in (
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "decode_context_parallel_size",
            "prefill_context_parallel_size",
            "nnodes",
            "world_size",
        )
    }
    parallel["distributed_executor_backend"] = changes.pop("executor", "mp")
    if "enable_batch_sharded_sampling" in changes:  # from vLLM 0.29 on
        parallel["enable_batch_sharded_sampling"] = changes.pop("enable_batch_sharded_sampling")
    parallel["use_ubatching"] = changes.pop("use_ubatching", False)
    cache = {"kv_sharing_fast_prefill": changes.pop("kv_sharing_fast_prefill", False)}
    if "calculate_kv_scales" in changes:
        cache["calculate_kv_scales"] = changes.pop("calculate_kv_scales")
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel),
        cache_config=SimpleNamespace(**cache),
        speculative_config=changes.pop("speculative_config", None),
        model_config=SimpleNamespace(runner_type=changes.pop("runner_type", "generate")),
    )
    assert not changes
    return config, runner


@pytest.mark.parametrize("runner", [V1Runner, V2Runner])
def test_both_of_vllms_runners_are_served(runner):
    check_device_engine(*make_engine(runner=runner))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"runner": SimpleNamespace}, "not known here"),
        ({"device": "meta"}, "runs on meta"),
        ({"pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"decode_context_parallel_size": 2}, "decode context parallelism"),
        ({"prefill_context_parallel_size": 2}, "prefill context parallelism"),
        ({"nnodes": 2}, "spans 2 machines"),
        ({"world_size": 2, "executor": "external_launcher"}, "launched one by one"),
        ({"enable_batch_sharded_sampling": True}, "enable_batch_sharded_sampling"),
        ({"use_ubatching": True}, "DBO"),
        ({"speculative_config": object()}, "decodes speculatively"),
        ({"runner_type": "pooling"}, "'pooling'"),
        ({"kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill"),
        ({"calculate_kv_scales": True}, "calculate_kv_scales"),
    ],
)
def test_engines_that_are_not_served_are_refused_with_their_reason(changes, says):
    with pytest.raises(RuntimeError, match=says) as refused:
        check_device_engine(*make_engine(**changes))
    assert "pivottrace score --capture replay" in str(refused.value)


@pytest.mark.parametrize("sharded", [None, False])
def test_an_engine_whose_ranks_all_see_the_logits_is_served(sharded):
    check_device_engine(*make_engine(world_size=2, enable_batch_sharded_sampling=sharded))


def test_an_engine_without_triton_is_refused(monkeypatch):
    monkeypatch.setattr(device_layers, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="Triton is not installed"):
        check_device_engine(*make_engine())


def make_layer(index, **changes):
    """An attention layer as vLLM's GPU backends make it, with just what is read of it."""
    from vllm.model_executor.layers.attention import Attention

    impl = {"num_heads": 4, "sliding_window": (-1, -1), "alibi_slopes": None, "sinks": None}
    for name in tuple(changes):
        if name in impl:
            impl[name] = changes.pop(name)
    module = Attention.__new__(Attention)
    torch.nn.Module.__init__(module)
    backend = changes.pop("backend", "FLASH_ATTN")
    module.impl = SimpleNamespace(**impl)
    module.attn_backend = SimpleNamespace(get_name=lambda: backend)
    plain = {
        "kv_cache_dtype": "auto",
        "attn_type": "decoder",
        "kv_sharing_target_layer_name": None,
    }
    for name, value in {**plain, **changes}.items():
        setattr(module, name, value)
    return f"model.layers.{index}.self_attn.attn", module


def full_spec():
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float16)


def find(layers, config, spec=None):
    spec = full_spec() if spec is None else spec
    kv_cache_config = SimpleNamespace(
        kv_cache_groups=[
            SimpleNamespace(layer_names=[name for name, _ in layers], kv_cache_spec=spec)
        ]
    )
    vllm_config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=dict(layers))
    )
    problem = device_problem(kv_cache_config)
    return [
        layer.index for layer in find_layers(vllm_config, kv_cache_config, config, problem=problem)
    ]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"backend": "FLEX_ATTENTION"}, "backend FLEX_ATTENTION"),
        ({"kv_cache_dtype": "nvfp4"}, "quantised KV cache"),
        ({"kv_cache_dtype": "int8_per_token_head"}, "quantised KV cache"),
        ({"kv_cache_dtype": "fp8", "backend": "CPU_ATTN"}, "quantised KV cache"),
        ({"alibi_slopes": torch.ones(4)}, "ALiBi"),
        ({"attn_type": "encoder_only"}, "type encoder_only"),
        ({"attention_chunk_size": 8192}, "within chunks"),
        ({"kv_sharing_target_layer_name": "model.layers.9"}, "those of model.layers.9"),
    ],
)
def test_a_layer_that_cannot_be_read_is_refused_if_named_and_passed_over_if_not(changes, says):
    layers = [make_layer(0, **changes), make_layer(1), make_layer(2)]
    with pytest.raises(RuntimeError, match=f"layer 0 .*{says}"):
        find(layers, CaptureConfig(layers=(0, 1)))
    assert set(find(layers, CaptureConfig())) <= {1, 2}


@pytest.mark.parametrize(
    "changes",
    [
        {"backend": "FLASHINFER"},
        {"backend": "TRITON_ATTN"},
        {"kv_cache_dtype": "fp8_e5m2"},
        {"kv_cache_dtype": "bfloat16"},
        {"sinks": torch.ones(4)},
    ],
)
def test_what_the_kernel_reads_is_served(changes, monkeypatch):
    monkeypatch.setattr(device_layers, "device_reads_fp8", lambda: True)
    assert find([make_layer(0, **changes)], CaptureConfig()) == [0]


@pytest.mark.parametrize("cache_dtype", ["fp8", "fp8_e4m3", "fp8_e5m2"])
def test_fp8_keys_are_refused_where_triton_does_not_convert_them(cache_dtype, monkeypatch):
    from vllm.platforms import current_platform

    monkeypatch.setattr(device_layers, "platform_fp8", lambda: torch.float8_e4m3fn)
    layers = [make_layer(0, kv_cache_dtype=cache_dtype)]
    for capability, is_served in ((80, False), (86, False), (89, True), (90, True)):
        monkeypatch.setattr(
            current_platform,
            "has_device_capability",
            lambda least, there=capability: there >= least,
        )
        if is_served:
            assert find(layers, CaptureConfig()) == [0]
        else:
            with pytest.raises(RuntimeError, match=r"FP8 KV cache .*capability 8\.9"):
                find(layers, CaptureConfig())


def test_fp8_of_another_platform_is_refused(monkeypatch):
    monkeypatch.setattr(device_layers, "device_reads_fp8", lambda: True)
    monkeypatch.setattr(device_layers, "platform_fp8", lambda: torch.float8_e4m3fnuz)
    layers = [make_layer(0, kv_cache_dtype="fp8")]
    with pytest.raises(RuntimeError, match="float8_e4m3fnuz"):
        find(layers, CaptureConfig())
    monkeypatch.setattr(device_layers, "platform_fp8", lambda: torch.float8_e4m3fn)
    assert find(layers, CaptureConfig()) == [0]


def test_layers_that_slide_are_traced_if_named_and_their_cache_keeps_every_key():
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    layers = [make_layer(0, sliding_window=(63, 0)), make_layer(1)]
    assert find(layers, CaptureConfig()) == [1]
    assert find(layers, CaptureConfig(layers=(0, 1))) == [0, 1]
    forgets = SlidingWindowSpec(
        block_size=16, num_kv_heads=2, head_size=32, dtype=torch.float16, sliding_window=64
    )
    with pytest.raises(RuntimeError, match=r"cache that forgets \(SlidingWindowSpec\)"):
        find(layers, CaptureConfig(layers=(0, 1)), forgets)


def test_the_kernel_serves_engines_on_a_gpu_and_torch_those_on_a_cpu():
    assert vllm_hooks.uses_kernel(SimpleNamespace(device=torch.device("cuda")))
    assert not vllm_hooks.uses_kernel(SimpleNamespace(device=torch.device("cpu")))


GIB = 1 << 30


def make_runner(monkeypatch, free, total=80, utilization=0.5, kv_bytes=None, device="cuda"):
    """A runner on a device of which `free` of `total` GiB are free."""
    pytest.importorskip("triton")
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: (int(free * GIB), int(total * GIB))
    )
    cache = SimpleNamespace(gpu_memory_utilization=utilization, kv_cache_memory_bytes=kv_bytes)
    return SimpleNamespace(device=torch.device(device), cache_config=cache)


def test_a_store_that_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    runner = make_runner(monkeypatch, free=1)
    from pivottrace_verl.attention.device_capture import check_memory

    check_memory(runner, GIB // 4)
    check_memory(make_runner(monkeypatch, free=1, device="cpu"), 1 << 60)
    with pytest.raises(RuntimeError, match=r"needs 2048 MiB.*1024 MiB that are free.*by 0.02"):
        check_memory(runner, 2 * GIB)


def test_what_vllm_takes_after_the_store_is_left_to_it(monkeypatch):
    # vLLM may use 72 of 80 GiB and took 68: activations and graphs come.
    runner = make_runner(monkeypatch, free=12, utilization=0.9)
    from pivottrace_verl.attention.device_capture import check_memory

    check_memory(runner, 7 * GIB)
    with pytest.raises(RuntimeError, match="keeps 4096 MiB for itself and 512 MiB must be left"):
        check_memory(runner, 8 * GIB)
    # Where the size of its cache was named it counts nothing.
    check_memory(make_runner(monkeypatch, 12, utilization=0.9, kv_bytes=GIB), 11 * GIB)
