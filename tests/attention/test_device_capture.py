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
from pivottrace_verl.attention.parts import Place, divide, merge
from pivottrace_verl.attention.reference import (
    ScoreRule,
    group_heads,
    plan_rows,
    row_statistics,
    token_statistics,
)
from pivottrace_verl.attention.support import TracedLayer, sliding_window
from pivottrace_verl.attention.task import Task
from pivottrace_verl.pivots import FEATURES

if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
with pytest.MonkeyPatch.context() as patch:
    # Kernels are interpreted if this is set where they are defined...
    patch.setenv("TRITON_INTERPRET", "1")
    from pivottrace_verl.attention import device_layers, kernel
    from pivottrace_verl.attention.device_capture import _COMMON, DeviceCapture


# ... and when one is first launched; Triton's own library: tests/conftest.py.
pytestmark = pytest.mark.usefixtures("interpreted")


HEADS, KV_HEADS, SIZE, BLOCK, N_BLOCKS, WORDS, MAX_REQUESTS = 4, 2, 16, 16, 12, 50, 4
CONFIG = CaptureConfig(layers=(0, 1), head_groups=((0, 1), (3,)), window=8, sink=2)
RULE = ScoreRule(0.25)


def as_halves(order):
    cache = torch.zeros([(N_BLOCKS, 2, BLOCK, KV_HEADS, SIZE)[i] for i in order])
    return cache.permute([order.index(i) for i in range(5)]), lambda cache: cache[:, 0]


def as_joined(order):
    cache = torch.zeros([(N_BLOCKS, KV_HEADS, BLOCK, 2 * SIZE)[i] for i in order])
    cache = cache.permute([order.index(i) for i in range(4)])
    return cache, lambda cache: cache.transpose(1, 2)[..., :SIZE]


CACHES = {  # vLLM's layouts, with the view through which its own code writes keys
    "0.24 NHD": lambda: as_halves((0, 1, 2, 3, 4)),
    "0.24 HND": lambda: as_halves((0, 1, 3, 2, 4)),
    "0.28 HND": lambda: as_joined((0, 1, 2, 3)),
    "0.28 NHD": lambda: as_joined((0, 2, 1, 3)),
}


class Impl:
    """What is read of a backend's implementation."""

    num_heads, scale, logits_soft_cap, sinks, alibi_slopes = HEADS, RULE.scale, 0, None, None
    sliding_window = (-1, -1)

    def __init__(self, keys):
        self.keys = keys

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        view = self.keys(kv_cache)
        scale = getattr(layer, "_k_scale", torch.tensor(1.0))
        view[slot_mapping // BLOCK, slot_mapping % BLOCK] = (key / scale).to(view.dtype)

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output):
        return output


def make_layer(index, cache="0.28 HND", backend="FLASH_ATTN", **changes):
    content, keys = CACHES[cache]()
    module = SimpleNamespace(
        impl=Impl(keys), kv_cache=content, kv_cache_dtype="auto", attn_type="decoder",
        attn_backend=SimpleNamespace(get_name=lambda: backend), kv_sharing_target_layer_name=None,
    )  # fmt: skip
    vars(module).update(changes)
    return TracedLayer(index, f"model.layers.{index}.self_attn.attn", module, 0, HEADS)


class Buffers:
    """A runner's persistent tensors, and metadata of the padded batch they hold."""

    def __init__(self, n_tokens):
        self.query_start_loc = torch.zeros(MAX_REQUESTS + 1, dtype=torch.int32)
        self.seq_lens = torch.zeros(MAX_REQUESTS, dtype=torch.int32)
        self.block_table = torch.zeros(MAX_REQUESTS, N_BLOCKS, dtype=torch.int32)
        self.slot_mapping = torch.full((n_tokens,), -1, dtype=torch.int64)
        self.query = torch.zeros(2, n_tokens, HEADS, SIZE)

    def decode(self, requests, generator):
        """A batch of one new token a request; requests are (tokens so far, blocks)."""
        n = len(requests)
        self.query_start_loc[:] = torch.arange(MAX_REQUESTS + 1).clamp(max=n)
        self.seq_lens.zero_()
        self.slot_mapping.fill_(-1)
        self.query.copy_(torch.randn(self.query.shape, generator=generator))
        for r, (length, blocks) in enumerate(requests):
            self.seq_lens[r] = length
            self.block_table[r, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
            self.slot_mapping[r] = blocks[(length - 1) // BLOCK] * BLOCK + (length - 1) % BLOCK


class Runner:
    """What is read of a model runner, and the order in which vLLM calls it."""

    def __init__(self):
        self.device, self.max_num_reqs = torch.device("cpu"), MAX_REQUESTS
        self.model_config = SimpleNamespace(dtype=torch.float32)
        self.model = SimpleNamespace(compute_logits=lambda hidden: hidden)
        self.input_batch = SimpleNamespace(req_ids=[])
        self.attn_groups = [[]]

    def execute_model(self, scheduler_output, **_):
        return scheduler_output

    def _prepare_inputs(self, req_ids):
        self.input_batch.req_ids = req_ids

    def _dummy_run(self, run):
        run()


def make_capture(layers, config=CONFIG, groups=None, rank=0, ranks=1):
    runner, sent = Runner(), []
    spec = SimpleNamespace(block_size=BLOCK)
    cache = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)])
    cache.num_blocks = N_BLOCKS
    if groups is None:
        groups = [config.choose_heads(HEADS, place) for place in range(len(layers))]
    sender = SimpleNamespace(trace=lambda *trace: sent.append(trace))
    place = Place(rank, ranks)
    part = divide([0] * len(layers), groups, HEADS, place)[rank]
    witness = None if part.layers else layers[0]
    capture = DeviceCapture(
        Task(runner, cache, config, layers, groups, place, part, witness), sender
    )
    capture.part = part
    return capture, runner, sent


def forward(capture, buffers, metadata):
    for position, layer in enumerate(capture.layers):
        query = buffers.query[position]
        layer.module.impl.forward(
            layer.module, query, None, None, layer.module.kv_cache, metadata, output=query
        )


class Recorder:
    """Stands in the place of a kernel: launches it, and keeps the launch."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.launches.append((self.kernel, grid, args, constants))
            self.kernel[grid](*args, **constants)

        return launch


def scheduled(new=(), going=(), finished=()):
    """A SchedulerOutput; new are (id, prompt, blocks, asks), going (id, tokens computed)."""
    return SimpleNamespace(
        finished_req_ids=set(finished),
        preempted_req_ids=None,
        scheduled_new_reqs=[
            SimpleNamespace(
                req_id=name, prompt_token_ids=[0] * prompt, block_ids=(list(blocks),),
                num_computed_tokens=prompt - 1, prefill_token_ids=None,
                sampling_params=SimpleNamespace(
                    extra_args={"pivottrace": {"key": name}} if asks else None
                ),
            )
            for name, prompt, blocks, asks in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[name for name, _ in going], resumed_req_ids=set(),
            new_block_ids=[None] * len(going), num_computed_tokens=[n for _, n in going],
            num_output_tokens=[0] * len(going),
        ),
        num_scheduled_tokens=dict.fromkeys([*(n[0] for n in new), *(g[0] for g in going)], 1),
        total_num_scheduled_tokens=len(new) + len(going),
    )  # fmt: skip


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


class Nothing:
    """A kernel that is not launched: Triton's interpreter works with torch itself."""

    def __getitem__(self, grid):
        return lambda *args, **constants: None


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
