"""The hooks of the device path around a made-up runner: every layout of keys, and replayed graphs.

A CUDA graph replays launches on the tensors it was captured with and runs no Python. So here the
launches of one call of the wrapped attention are recorded, and then done again on new contents of
the same tensors, with nothing of ours in between but the step's own hooks outside of the graph.
"""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.attention.keys import StridedKeys
from pivottrace_verl.attention.parts import merge
from pivottrace_verl.attention.reference import (
    group_heads,
    plan_rows,
    row_statistics,
    token_statistics,
)
from pivottrace_verl.attention.support import sliding_window
from pivottrace_verl.pivots import FEATURES

if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
from tests.attention.device_engine import (
    _COMMON,
    BLOCK,
    CACHES,
    CONFIG,
    MAX_REQUESTS,
    N_BLOCKS,
    RULE,
    SIZE,
    WORDS,
    Buffers,
    Nothing,
    Runner,
    device_layers,
    forward,
    kernel,
    make_capture,
    make_layer,
    scheduled,
)

pytestmark = pytest.mark.usefixtures("interpreted")


class Recorder:
    """Stands in the place of a kernel: launches it, and keeps the launch."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.launches.append((self.kernel, grid, args, constants))
            self.kernel[grid](*args, **constants)

        return launch


@pytest.mark.parametrize("cache", CACHES)
def test_a_replayed_graph_writes_the_rows_of_the_batch_it_is_replayed_on(cache, monkeypatch):
    g = torch.Generator().manual_seed(0)
    layers = [make_layer(i, cache) for i in range(2)]
    capture, runner, sent = make_capture(layers)
    capture.wrap()
    buffers = Buffers(MAX_REQUESTS + 2)
    for layer in layers:
        layer.module.kv_cache.copy_(torch.randn(layer.module.kv_cache.shape, generator=g))
    metadata = SimpleNamespace(
        query_start_loc=buffers.query_start_loc, seq_lens=buffers.seq_lens,
        block_table=buffers.block_table, slot_mapping=buffers.slot_mapping,
    )  # fmt: skip
    launches = []
    with monkeypatch.context() as recording:
        for name in ("walk", "merge"):
            recording.setattr(kernel, name, Recorder(getattr(kernel, name), launches))
        buffers.decode([(9, [5]), (9, [6]), (9, [7]), (9, [8])], g)
        runner._dummy_run(lambda: forward(capture, buffers, metadata))
    assert len(launches) == 4
    assert bool((capture.rows.slots == -1).all())
    assert bool((capture.store.owner == 0).all())

    # Requests: 40 tokens of which 30 are the prompt; one that does not ask; 17 of which 17 are.
    spread = {"a": [3, 1, 9], "b": [4, 2], "c": [10, 11]}
    steps = [
        (scheduled([("a", 30, spread["a"], True), ("b", 20, spread["b"], False)]), "ab"),
        (scheduled([("c", 17, spread["c"], True)], [("a", 30), ("b", 20)]), "cba"),
        (scheduled(going=[("b", 21), ("c", 17), ("a", 31)]), "bca"),
        (scheduled(going=[("a", 32), ("c", 18)], finished=["b"]), "ac"),
    ]
    computed, wanted = {"a": 29, "b": 19, "c": 16}, {"a": [], "c": []}
    for step, order in steps:
        runner.execute_model(step)
        runner._prepare_inputs(list(order))
        for name in order:
            computed[name] += 1
        buffers.decode([(computed[name], spread[name]) for name in order], g)
        for launched, grid, args, constants in launches:
            launched[grid](*args, **constants)
        logits = torch.randn(len(order), WORDS, generator=g) * 3
        logits[:, WORDS // 2 :: 3] = -torch.inf
        runner.model.compute_logits(logits)
        runner.model.compute_logits(torch.zeros(7, WORDS))  # of a prompt, later in the step
        for r, name in enumerate(order):
            if name in wanted:
                row = dense(layers, buffers, r, computed[name], {"a": 30, "c": 17}[name], cache)
                wanted[name].append((row, token_statistics(logits[r : r + 1])[0]))
    runner.execute_model(scheduled(finished=["a", "c"]))
    found = {key: (stats, tokens, missing) for key, stats, tokens, missing in sent}
    assert set(found) == {"a", "c"}
    for name, rows in wanted.items():
        stats, tokens, missing = found[name]
        assert missing == 0
        assert len(stats) == len(rows) == {"a": 4, "c": 3}[name]
        torch.testing.assert_close(
            torch.from_numpy(stats), torch.stack([r for r, _ in rows]), atol=2e-5, rtol=1e-5
        )
        torch.testing.assert_close(
            torch.from_numpy(tokens), torch.stack([t for _, t in rows]), atol=2e-5, rtol=1e-5
        )
    # Nothing was written for the request that did not ask, nor for padding.
    assert int((capture.store.owner != 0).sum()) == 7


class Operations(TorchDispatchMode):
    """Notes what torch is asked to do."""

    def __init__(self):
        super().__init__()
        self.made, self.views = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aliases = [value.alias_info for value in func._schema.returns]
        is_view = bool(aliases) and all(alias and not alias.is_write for alias in aliases)
        (self.views if is_view else self.made).append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cache", CACHES)
def test_the_hooks_allocate_nothing_compute_nothing_and_wait_for_nothing(cache, monkeypatch):
    layers = [make_layer(i, cache) for i in range(2)]
    capture, runner, _ = make_capture(layers)
    capture.wrap()
    for name in ("walk", "merge", "choices"):
        monkeypatch.setattr(kernel, name, Nothing())
    buffers = Buffers(MAX_REQUESTS)
    buffers.decode([(20, [3, 1])], torch.Generator().manual_seed(0))
    metadata = SimpleNamespace(
        query_start_loc=buffers.query_start_loc, seq_lens=buffers.seq_lens,
        block_table=buffers.block_table, slot_mapping=buffers.slot_mapping,
    )  # fmt: skip
    runner.execute_model(scheduled([("a", 20, [3, 1], True)]))
    runner._prepare_inputs(["a"])
    logits = torch.zeros(1, WORDS)
    with Operations() as operations:
        forward(capture, buffers, metadata)
        runner.model.compute_logits(logits)
    assert operations.made == []
    assert operations.views


def dense(layers, buffers, request, length, prompt, cache):
    """The row [L, G, F] of a request's last token, by the reference."""
    rows = []
    for position, layer in enumerate(layers):
        keys = StridedKeys(CACHES[cache]()[1](layer.module.kv_cache))
        plan = plan_rows(
            buffers.block_table[request : request + 1], torch.tensor([length - 1]),
            torch.tensor([prompt]), BLOCK, CONFIG,
        )  # fmt: skip
        query = buffers.query[position, request : request + 1]
        rows.append(group_heads(row_statistics(query, keys, plan, RULE), CONFIG.head_groups)[0])
    return torch.stack(rows)


@pytest.mark.parametrize("cache", CACHES)
def test_the_layout_of_keys_is_found_by_reading_back_and_the_cache_left_as_it_was(cache):
    layer = make_layer(0, cache)
    content = torch.randn(layer.module.kv_cache.shape, generator=torch.Generator().manual_seed(1))
    layer.module.kv_cache.copy_(content)
    layout = device_layers.prove_layout(layer, torch.float32)
    assert layout == ("halves" if cache.startswith("0.24") else "joined")
    assert torch.equal(layer.module.kv_cache, content)
    keys = device_layers.layer_keys(layer, layout)
    assert torch.equal(keys.view, CACHES[cache]()[1](layer.module.kv_cache))


@pytest.mark.parametrize("fp8", ["fp8_e4m3", "fp8_e5m2"])
def test_keys_in_fp8_are_read_back_with_the_layers_scale(fp8):
    layer = make_layer(0, kv_cache_dtype=fp8, _k_scale=torch.tensor(0.25))
    layer.module.kv_cache = torch.zeros(layer.module.kv_cache.shape, dtype=torch.uint8)
    dtype = device_layers.FP8_CACHES[fp8]
    joined = layer.module.impl.keys
    layer.module.impl.keys = lambda cache: joined(cache.view(dtype))
    assert device_layers.prove_layout(layer, torch.bfloat16) == "joined"
    layer.module._k_scale.fill_(0.5)
    assert float(device_layers.layer_keys(layer, "joined").scale) == 0.5
    layer.module.impl.keys = lambda cache: joined(cache.view(dtype)).flip(1)
    with pytest.raises(RuntimeError, match="cannot be read back"):
        device_layers.prove_layout(layer, torch.bfloat16)


def test_a_layout_that_is_not_known_is_refused():
    layer = make_layer(0)
    # Keys where values should be.
    layer.module.impl.keys = lambda cache: cache.transpose(1, 2)[..., SIZE:]
    with pytest.raises(RuntimeError, match=r"cannot be read back.*not known here"):
        device_layers.prove_layout(layer, torch.float32)


def test_a_window_is_read_as_each_backend_keeps_it():
    windows = [(-1, -1), (15, 0), -1, 16, None]
    found = [sliding_window(SimpleNamespace(sliding_window=w)) for w in windows]
    assert found == [None, 16, None, 16, None]


def test_metadata_without_a_block_table_is_read_through_what_it_was_made_of():
    class Metadata:
        slot_mapping = None

    class Builder:
        def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
            return Metadata()

    layer = make_layer(0, backend="FLASHINFER")
    capture, runner, _ = make_capture([layer], CaptureConfig(layers=(0,)))
    mine, other = Builder(), Builder()
    runner.attn_groups = [
        [
            SimpleNamespace(layer_names=[layer.name], metadata_builders=[mine]),
            SimpleNamespace(layer_names=["another"], metadata_builders=[other]),
        ]
    ]
    capture.wrap()
    g = torch.Generator().manual_seed(0)
    buffers = Buffers(MAX_REQUESTS)
    buffers.decode([(20, [3, 1])], g)
    common = SimpleNamespace(
        query_start_loc=buffers.query_start_loc, seq_lens=buffers.seq_lens,
        block_table_tensor=buffers.block_table, slot_mapping=buffers.slot_mapping,
    )  # fmt: skip
    runner.execute_model(scheduled([("a", 20, [3, 1], True)]))
    runner._prepare_inputs(["a"])
    metadata = mine.build(common_prefix_len=0, common_attn_metadata=common)
    forward(capture, buffers, metadata)
    assert capture.rows.slots.tolist() == [int(buffers.slot_mapping[0]), -1, -1, -1]
    assert not hasattr(other.build(0, common), _COMMON)


@pytest.mark.parametrize(
    "groups", [((0, 1, 5), (6,)), ((5, 7), (6,))], ids=["both ranks", "one rank, one witness"]
)
def test_the_parts_of_two_tensor_ranks_make_the_trace_of_one(groups):
    g = torch.Generator().manual_seed(0)
    config = CaptureConfig(layers=(0, 1))
    parts, heads = [], []
    for rank in range(2):
        layers = [make_layer(i) for i in range(2)]
        buffers = Buffers(MAX_REQUESTS)
        buffers.decode([(20, [3, 1])], g)
        for layer in layers:
            layer.module.kv_cache.copy_(torch.randn(layer.module.kv_cache.shape, generator=g))
        capture, runner, sent = make_capture(layers, config, [groups] * 2, rank, 2)
        capture.wrap()
        runner.execute_model(scheduled([("a", 20, [3, 1], True)]))
        runner._prepare_inputs(["a"])
        metadata = SimpleNamespace(
            query_start_loc=buffers.query_start_loc, seq_lens=buffers.seq_lens,
            block_table=buffers.block_table, slot_mapping=buffers.slot_mapping,
        )  # fmt: skip
        forward(capture, buffers, metadata)
        runner.model.compute_logits(torch.zeros(1, WORDS))
        capture.flush()
        (_, stats, tokens, missing) = sent[0]
        assert missing == 0
        parts.append((capture.part, stats, tokens))
        plan = plan_rows(
            buffers.block_table[:1], torch.tensor([19]), torch.tensor([20]), BLOCK, config
        )
        for position, layer in enumerate(layers):
            keys = StridedKeys(layer.module.impl.keys(layer.module.kv_cache))
            query = buffers.query[position, :1]
            heads.append(row_statistics(query, keys, plan, RULE))
    whole = [torch.cat([heads[position], heads[2 + position]], 1) for position in range(2)]
    wanted = torch.stack([group_heads(rows, groups) for rows in whole], 1)
    found, _ = merge(parts)
    torch.testing.assert_close(torch.from_numpy(found), wanted, atol=2e-5, rtol=1e-5)


def test_a_runner_that_returns_its_batch_is_followed_and_its_dummy_runs_are_not():
    capture, _, _ = make_capture([make_layer(0)], CaptureConfig(layers=(0,)))
    runner = SimpleNamespace(
        **vars(Runner()),
        execute_model=lambda scheduler_output, dummy_run=False: None,
        prepare_inputs=lambda req_ids: SimpleNamespace(req_ids=req_ids),
        _dummy_run=lambda: None,
    )
    capture.runner = runner
    capture.wrap()
    runner.execute_model(scheduled([("a", 3, [1], True), ("b", 3, [2], False)]))
    runner.prepare_inputs(["b", "a"])
    assert capture.rows.prompts.tolist() == [-1, 3, -1, -1]
    runner.model.compute_logits(torch.zeros(2, WORDS))
    runner._dummy_run()
    runner.execute_model("no scheduler's output", dummy_run=True)
    assert capture.rows.prompts.tolist() == [-1] * 4


def test_steps_whose_logits_are_missing_or_somebody_elses_stop_the_engine():
    capture, runner, _ = make_capture([make_layer(0)], CaptureConfig(layers=(0,)))
    capture.wrap()
    step = scheduled([("a", 3, [1], True)])
    runner.execute_model(step)
    runner._prepare_inputs(["a"])
    with pytest.raises(RuntimeError, match="logits of 2 tokens in a step of 1 requests"):
        runner.model.compute_logits(torch.zeros(2, WORDS))
    runner._prepare_inputs(["a"])
    with pytest.raises(RuntimeError, match="a step without logits"):
        runner.execute_model(step)


def test_what_is_described_is_what_the_owner_expects():
    capture, _, _ = make_capture([make_layer(i) for i in range(2)])
    told = capture.describe()
    assert (told["backend"], told["layers"], told["key_layout"]) == ("FLASH_ATTN", [0, 1], "joined")
    assert told["features"] == list(FEATURES)
    assert told["slots"] == N_BLOCKS * BLOCK
