"""A capture by kernels that reads something else than its layers attend to stops the engine."""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.attention.first_rows import FIRST

if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
from tests.attention.device_engine import (
    BLOCK,
    KV_HEADS,
    SIZE,
    WORDS,
    Buffers,
    Nothing,
    device_layers,
    kernel,
    make_capture,
    make_layer,
    scheduled,
)

pytestmark = pytest.mark.usefixtures("interpreted")

BLOCKS, SWAPPED = [3, 1, 9], [1, 3, 9]


class Engine:
    """Prompts that a step computes whole, two layers, in an engine that just has what is read."""

    def __init__(self, layers=None, **capture):
        self.generator = torch.Generator().manual_seed(0)
        self.layers = layers or [make_layer(i) for i in range(2)]
        self.capture, self.runner, self.sent = make_capture(self.layers, **capture)
        self.capture.wrap()

    def prefill(self, length=40, computed=None, read=BLOCKS, order="a", spread=1.0, **asked):
        """A step that computes prompt `a` from token `computed` or the start; its keys lie in
        `BLOCKS`, the batch's table says `read`; `order`: of the requests the runner has."""
        before = computed or 0
        step = scheduled([("a", length, BLOCKS, True)])
        step.scheduled_new_reqs[0].num_computed_tokens = before
        step.scheduled_new_reqs[0].sampling_params.extra_args["pivottrace"].update(asked)
        step.num_scheduled_tokens["a"] = length - before
        self.runner.execute_model(step)
        self.runner._prepare_inputs(list(order))
        n = length - before
        buffers = Buffers(n + 2)
        buffers.query = spread * torch.randn(buffers.query.shape, generator=self.generator)
        buffers.seq_lens[0] = length
        buffers.query_start_loc[1:] = n
        buffers.block_table[0, : len(read)] = torch.tensor(read)
        positions = torch.arange(before, length)
        buffers.slot_mapping[:n] = (
            torch.tensor(BLOCKS)[positions // BLOCK] * BLOCK + positions % BLOCK
        )
        metadata = SimpleNamespace(
            query_start_loc=buffers.query_start_loc, seq_lens=buffers.seq_lens,
            block_table=buffers.block_table, slot_mapping=buffers.slot_mapping,
        )  # fmt: skip
        for position, layer in enumerate(self.capture.layers):
            key = torch.randn(n + 2, KV_HEADS, SIZE, generator=self.generator)
            module = layer.module
            module.impl.do_kv_cache_update(
                module, key[:n], key[:n], module.kv_cache, buffers.slot_mapping[:n]
            )
            query = buffers.query[position]
            module.impl.forward(module, query, key, key, module.kv_cache, metadata, output=query)
        self.runner.model.compute_logits(torch.zeros(len(order), WORDS))
        self.runner.execute_model(scheduled(finished=["a"]))


def test_first_prompts_that_are_read_where_they_were_written_are_checked_and_sent():
    engine = Engine()
    for i in range(FIRST + 1):
        engine.prefill(20 + i)
        left = max(0, FIRST - 1 - i)
        assert engine.capture._unchecked == [left] * 2
        assert engine.capture._unsent == left
    assert [(key, len(tokens), missing) for key, _, tokens, missing in engine.sent] == [
        ("a", 1, 0)
    ] * (FIRST + 1)


def test_a_prompt_that_goes_on_with_a_rollout_passes_the_check():
    engine = Engine()
    engine.prefill(40, prompt_tokens=9)
    assert engine.capture._unchecked == [FIRST - 1] * 2


def test_a_prompt_that_is_read_elsewhere_stops_the_engine():
    engine = Engine()
    with pytest.raises(RuntimeError, match="in layer 0 for a first prompt is not what"):
        engine.prefill(read=SWAPPED)
    assert not engine.sent


def test_a_layer_whose_keys_are_read_wrong_is_named():
    engine = Engine()
    engine.capture.layouts[1] = "values"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            device_layers.VIEWS, "values", lambda cache: cache[..., SIZE:].transpose(1, 2)
        )
        patch.setattr(engine.layers[1].module.impl, "do_kv_cache_update", lambda *args: None)
        with pytest.raises(RuntimeError, match="in layer 1 for a first prompt is not what"):
            engine.prefill()


def test_a_batch_in_another_order_than_the_runner_says_stops_the_engine():
    with pytest.raises(RuntimeError, match=r"expected the 40 tokens .* at place 1 .* where 0 are"):
        Engine().prefill(order="ba")


def test_later_prompts_are_not_checked_and_wait_for_nothing():
    engine = Engine()
    engine.capture._unchecked = [0, 0]
    engine.prefill(read=SWAPPED)
    assert len(engine.sent) == 1


@pytest.mark.parametrize("case", ["cached prefix", "long", "in a graph that is captured"])
def test_what_the_check_cannot_know_is_left_to_later_prompts(case, monkeypatch):
    engine = Engine()
    if case == "long":
        monkeypatch.setattr("pivottrace_verl.attention.device_capture.LONGEST", 39, raising=True)
    if case.startswith("in a graph"):
        monkeypatch.setattr(engine.capture, "_is_capturing", lambda: True)
    engine.prefill(read=SWAPPED, computed=16 if case == "cached prefix" else None)
    assert engine.capture._unchecked == [FIRST] * 2


@pytest.mark.parametrize("fp8", ["fp8_e4m3", "fp8_e5m2"])
def test_prompts_in_fp8_are_checked_against_the_keys_as_they_were_rounded(fp8):
    layer = make_layer(0, kv_cache_dtype=fp8, _k_scale=torch.tensor(0.25))
    layer.module.kv_cache = torch.zeros(layer.module.kv_cache.shape, dtype=torch.uint8)
    joined = layer.module.impl.keys
    layer.module.impl.keys = lambda cache: joined(cache.view(device_layers.FP8_CACHES[fp8]))
    engine = Engine([layer], config=CaptureConfig(layers=(0,), window=8, sink=2))
    # Attention so sharp that what keys lose in 8 bits is seen.
    engine.prefill(spread=8.0)
    assert engine.capture._unchecked == [FIRST - 1]
    with pytest.raises(RuntimeError, match="is not what"):
        engine.prefill(read=SWAPPED)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_without_heads_of_a_group_checks_the_others(rank):
    groups = [((0, 1, 2, 3), (4, 5))] * 2
    engine = Engine(config=CaptureConfig(layers=(0, 1)), groups=groups, rank=rank, ranks=2)
    engine.prefill()
    assert engine.capture._unchecked == [FIRST - 1] * 2
    with pytest.raises(RuntimeError, match="is not what"):
        engine.prefill(read=SWAPPED)


def test_a_first_request_without_all_its_rows_stops_the_engine(monkeypatch):
    engine = Engine()
    engine.capture._unchecked = [0, 0]
    monkeypatch.setattr(kernel, "choices", Nothing())
    with pytest.raises(RuntimeError, match="0 rows for the 1 tokens generated"):
        engine.prefill()
    assert not engine.sent


def test_the_kernel_of_the_logits_is_compiled_by_a_warm_up_and_writes_nothing_there(monkeypatch):
    engine, launched = Engine(), []

    class Counted:
        def __getitem__(self, grid):
            return lambda *args, **constants: launched.append(grid)

    with monkeypatch.context() as patch:
        patch.setattr(kernel, "choices", Counted())
        engine.runner._dummy_run(lambda: None)
        for _ in range(2):
            engine.runner.model.compute_logits(torch.zeros(7, WORDS))
    assert launched == [(1,)]
    engine.capture._choices_compiled = False
    engine.runner.model.compute_logits(torch.zeros(7, WORDS))
    assert bool((engine.capture.store.owner == 0).all())
