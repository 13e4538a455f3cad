"""Set-ups that cannot be captured stop the engine at start, with a sentence that says why."""

import math
from types import SimpleNamespace

import pytest
import torch

from pivottrace_verl.attention import vllm_hooks
from pivottrace_verl.attention.channel import Receiver
from pivottrace_verl.attention.config import ENV_CAPTURE, ENV_DISABLE, ENV_ENDPOINT, CaptureConfig
from pivottrace_verl.attention.parts import Place
from pivottrace_verl.attention.reference import token_statistics
from pivottrace_verl.attention.support import (
    TracedLayer,
    check_engine,
    find_layers,
    key_layout,
    sliding_window,
)
from pivottrace_verl.errors import PivotTraceError

pytestmark = pytest.mark.vllm


def make_engine(**changes):
    """(vllm_config, runner) of an engine that can be captured, then changed."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    parallel = {
        name: changes.pop(name, 1)
        for name in (
            "pipeline_parallel_size",
            "decode_context_parallel_size",
            "prefill_context_parallel_size",
            "nnodes",
            "world_size",
        )
    }
    parallel["distributed_executor_backend"] = changes.pop("executor", "mp")
    runner = object.__new__(changes.pop("runner_class", GPUModelRunner))
    runner.device = torch.device(changes.pop("device", "cpu"))
    runner.use_async_scheduling = changes.pop("use_async_scheduling", False)
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel),
        speculative_config=changes.pop("speculative_config", None),
        model_config=SimpleNamespace(runner_type=changes.pop("runner_type", "generate")),
    )
    assert not changes
    return config, runner


class OtherRunner:
    """Stands for a runner that is not vLLM's V1 runner."""


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"runner_class": OtherRunner}, "only vLLM's V1 runner"),
        ({"device": "meta"}, "only vLLM's CPU backend"),
        ({"decode_context_parallel_size": 2}, "decode context parallelism"),
        ({"prefill_context_parallel_size": 2}, "prefill context parallelism"),
        ({"nnodes": 2}, "spans 2 machines"),
        ({"world_size": 2, "executor": "external_launcher"}, "launched one by one"),
        ({"speculative_config": SimpleNamespace(method="eagle")}, "drafts tokens by 'eagle'"),
        (
            {"speculative_config": SimpleNamespace(method="ngram"), "pipeline_parallel_size": 2},
            "in a pipeline of stages",
        ),
        ({"use_async_scheduling": True}, "schedules asynchronously"),
        ({"runner_type": "pooling"}, "'pooling'"),
    ],
)
def test_unsupported_engines_are_refused_with_their_reason(changes, says):
    check_engine(*make_engine())
    with pytest.raises(RuntimeError, match=says) as refused:
        check_engine(*make_engine(**changes))
    assert "pivottrace score --capture replay" in str(refused.value)


def make_layer(index, **changes):
    """An attention layer of the CPU backend, with just what is read of it."""
    from vllm.model_executor.layers.attention import Attention

    impl = {
        "num_heads": 4,
        "isa": "vec",
        "is_fp8_kv_cache": False,
        "kv_cache_dtype": "auto",
        "sliding_window": -1,
        "logits_soft_cap": 0,
        "alibi_slopes": None,
        "sinks": None,
    }
    module = Attention.__new__(Attention)
    torch.nn.Module.__init__(module)
    backend, dtype = changes.pop("backend", "CPU_ATTN"), changes.pop("dtype", torch.float32)
    module.impl = SimpleNamespace(**{**impl, **changes})
    module.attn_backend = SimpleNamespace(get_name=lambda: backend)
    module.kv_cache = torch.zeros(3, 2, 32, 64, dtype=dtype)
    return f"model.layers.{index}.self_attn.attn", module


def make_configs(layers, groups=None):
    names = [name for name, _ in layers]
    groups = groups or [names]
    return (
        SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=dict(layers))),
        SimpleNamespace(
            kv_cache_groups=[SimpleNamespace(layer_names=g, kv_cache_spec=None) for g in groups]
        ),
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"backend": "FLEX"}, "backend FLEX"),
        ({"dtype": torch.float8_e4m3fn}, "quantised KV cache"),
        ({"is_fp8_kv_cache": True}, "quantised KV cache"),
        ({"alibi_slopes": torch.ones(4)}, "ALiBi"),
        ({"sinks": torch.ones(4)}, "attention sinks"),
    ],
)
def test_a_layer_that_cannot_be_read_is_refused_if_named_and_passed_over_if_not(changes, says):
    configs = make_configs([make_layer(0, **changes), make_layer(1), make_layer(2)])
    with pytest.raises(RuntimeError, match=f"layer 0 .*{says}"):
        find_layers(*configs, CaptureConfig(layers=(0, 1)))
    assert {layer.index for layer in find_layers(*configs, CaptureConfig())} <= {1, 2}
    with pytest.raises(RuntimeError, match=says):
        find_layers(*make_configs([make_layer(0, **changes)]), CaptureConfig())


def test_sliding_layers_are_traced_if_named_or_if_there_are_no_others():
    mixed = make_configs([make_layer(i, sliding_window=(16, -1)[i % 2]) for i in range(4)])
    assert [layer.index for layer in find_layers(*mixed, CaptureConfig())] == [1, 3]
    named = find_layers(*mixed, CaptureConfig(layers=(0, 1)))
    assert [sliding_window(layer.module.impl) for layer in named] == [16, None]
    alone = make_configs([make_layer(0, sliding_window=16)])
    assert [layer.index for layer in find_layers(*alone, CaptureConfig())] == [0]


def test_sliding_layers_whose_old_keys_are_dropped_are_refused():
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    alone = make_configs([make_layer(0, sliding_window=16)])
    alone[1].kv_cache_groups[0].kv_cache_spec = object.__new__(SlidingWindowSpec)
    with pytest.raises(RuntimeError, match=r"window of 16 .*disable_hybrid_kv_cache_manager=True"):
        find_layers(*alone, CaptureConfig())


def test_models_without_plain_attention_are_refused():
    configs = make_configs([("model.layers.0.mla", torch.nn.Identity())])
    with pytest.raises(RuntimeError, match=r"no plain attention layer.*Identity"):
        find_layers(*configs, CaptureConfig())


def test_layers_of_different_kinds_are_not_mixed():
    layers = [make_layer(0), make_layer(1)]
    split = make_configs(layers, groups=[[layers[0][0]], [layers[1][0]]])
    with pytest.raises(RuntimeError, match="different KV cache groups"):
        find_layers(*split, CaptureConfig())
    with pytest.raises(RuntimeError, match="different numbers of heads"):
        find_layers(*make_configs([make_layer(0), make_layer(1, num_heads=8)]), CaptureConfig())


def test_stages_of_a_pipeline_choose_the_same_layers_from_all_of_them():
    """Eight layers, four a stage; one cannot be read, and only its stage sees why."""
    stages = [
        make_configs([make_layer(i) for i in range(4)]),
        make_configs([make_layer(4, alibi_slopes=1), *(make_layer(i) for i in (5, 6, 7))]),
    ]
    surveys = []

    def tell(own):
        surveys.append(own)
        return [own]

    for stage, configs in enumerate(stages):
        find_layers(*configs, CaptureConfig(), Place(0, 1, stage, 2), tell)
    for config, chosen in (
        (CaptureConfig(), [2, 5]),
        (CaptureConfig(layers=(7, 0, 5)), [7, 0, 5]),
    ):
        seen = [
            find_layers(*configs, config, Place(0, 1, stage, 2), lambda _: surveys)
            for stage, configs in enumerate(stages)
        ]
        for stage, layers in enumerate(seen):
            assert [layer.index for layer in layers] == chosen
            assert [layer.stage for layer in layers] == [int(index > 3) for index in chosen]
            assert [layer.module is not None for layer in layers] == [
                layer.stage == stage for layer in layers
            ]
    for stage, configs in enumerate(stages):
        with pytest.raises(RuntimeError, match=r"layer 4 .*ALiBi"):
            find_layers(
                *configs, CaptureConfig(layers=(4,)), Place(0, 1, stage, 2), lambda _: surveys
            )


def test_heads_are_chosen_in_numbers_of_the_whole_layer():
    configs = make_configs([make_layer(0), make_layer(1)])
    config = CaptureConfig(head_groups=((7,),))
    assert find_layers(*configs, config, Place(0, 2))
    with pytest.raises(PivotTraceError, match="head 7"):
        find_layers(*configs, config, Place(0, 1))


def test_layers_and_heads_the_model_does_not_have_are_told():
    configs = make_configs([make_layer(0), make_layer(1)])
    with pytest.raises(PivotTraceError, match="layer 5"):
        find_layers(*configs, CaptureConfig(layers=(5,)))
    with pytest.raises(PivotTraceError, match="head 9"):
        find_layers(*configs, CaptureConfig(head_groups=((9,),)))


def test_a_key_layout_that_is_not_known_is_refused():
    name, module = make_layer(0)

    def row_by_row(layer, key, value, cache, slots):
        cache[slots // 32, :, slots % 32, :32] = key

    module.impl.do_kv_cache_update = row_by_row
    with pytest.raises(RuntimeError, match=r"cannot be read back.*'vec'"):
        key_layout(TracedLayer(0, name, module, 0, 4))


def test_capture_without_a_receiver_is_refused(monkeypatch):
    monkeypatch.setenv(ENV_CAPTURE, CaptureConfig().to_json())
    monkeypatch.delenv(ENV_ENDPOINT, raising=False)
    with pytest.raises(RuntimeError, match="started before the engine"):
        vllm_hooks.attach(None, None)


@pytest.fixture
def methods(monkeypatch):
    """A function that says what the wrapped methods are now; they are put back."""
    from vllm.v1.engine.parallel_sampling import ParentRequest
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    places = ((WorkerWrapperBase, "initialize_from_config"), (ParentRequest, "get_child_info"))
    for owner, name in places:
        monkeypatch.setattr(owner, name, getattr(owner, name))
    return lambda: [getattr(owner, name) for owner, name in places]


def test_installing_twice_wraps_once_and_not_at_all_unless_asked(monkeypatch, methods):
    stock = methods()
    vllm_hooks.install()
    assert methods() == stock
    with Receiver(CaptureConfig()):
        monkeypatch.setenv(ENV_DISABLE, "1")
        vllm_hooks.install()
        assert methods() == stock
        monkeypatch.delenv(ENV_DISABLE)
        vllm_hooks.install()
        wrapped = methods()
        assert not set(wrapped) & set(stock)
        vllm_hooks.install()
        assert methods() == wrapped


def children(extra_args, seed=None):
    """Extra arguments of a request with n = 3, and of its children as vLLM makes them."""
    from vllm import SamplingParams
    from vllm.v1.engine.parallel_sampling import ParentRequest

    params = SamplingParams(n=3, seed=seed, extra_args=extra_args)
    request = SimpleNamespace(request_id="12_ab-0", external_req_id="12_ab", params=params)
    parent = ParentRequest(request)
    made = [parent.get_child_info(i) for i in range(3)]
    assert [name for name, _ in made] == [f"{i}_12_ab-0" for i in range(3)]
    assert [child.seed for _, child in made] == [
        None if seed is None else seed + i for i in (0, 1, 2)
    ]
    assert all(child.n == 1 for _, child in made)
    return params.extra_args, [child.extra_args for _, child in made]


@pytest.mark.parametrize("seed", [None, 5])
def test_each_child_of_a_request_asks_under_a_key_of_its_own(methods, seed):
    asked = {"other": 1, "pivottrace": {"key": "k", "prompt_tokens": 2}}
    with Receiver(CaptureConfig()):
        vllm_hooks.install()
        own, given = children(asked, seed)
        assert own == asked
        assert given == [
            {"other": 1, "pivottrace": {"key": key, "prompt_tokens": 2}}
            for key in ("k", "k/1", "k/2")
        ]
        # What is malformed is told by the worker, of every child.
        for bad in (None, {}, {"other": 1}, {"pivottrace": "k"}, {"pivottrace": {"key": 3}}):
            assert children(bad) == (bad, [bad] * 3)
    assert children(asked) == (asked, [asked] * 3), "nobody asks for capture any more"


def test_token_statistics_are_those_of_softmax_with_masked_words_left_out():
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(0)) * 4
    logits[:, 100:] = -torch.inf
    log_p = logits[:, :100].double().log_softmax(-1)
    uniform = torch.full_like(log_p, 1 / 100)
    expected = torch.stack(
        [-(log_p.exp() * log_p).sum(-1), (uniform * (uniform.log() - log_p)).sum(-1)], dim=-1
    )
    found = token_statistics(logits).double()
    assert torch.allclose(found, expected, atol=1e-6)
    # The same without masks, and with one row masked among rows that are not.
    assert torch.allclose(
        token_statistics(logits[:, :100].contiguous()).double(), expected, atol=1e-6
    )
    logits[1:, 100:] = 0.0
    assert torch.allclose(token_statistics(logits)[0].double(), expected[0], atol=1e-6)


def test_self_certainty_is_zero_for_a_uniform_distribution_and_grows_with_confidence():
    logits = torch.zeros(3, 50)
    logits[1, 7], logits[2, 7] = 5.0, 200.0
    certainty = token_statistics(logits)[:, 1]
    assert certainty[0].abs() < 1e-6
    assert certainty[0] < certainty[1] < certainty[2]
    # Far beyond the floor of the entropy's sum the definition still holds.
    assert abs(float(certainty[2]) - (200 * 49 / 50 - math.log(50))) < 1e-3
