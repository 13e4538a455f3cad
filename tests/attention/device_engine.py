"""A made-up runner and layers around the hooks of the device path, kernels in the interpreter.

Importing it needs Triton.
"""

from types import SimpleNamespace

import pytest
import torch

from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.attention.parts import Place, divide
from pivottrace_verl.attention.reference import ScoreRule
from pivottrace_verl.attention.support import TracedLayer
from pivottrace_verl.attention.task import Task

with pytest.MonkeyPatch.context() as patch:
    # Kernels are interpreted if this is set where they are defined, and when one is first launched;
    # Triton's own library: tests/conftest.py.
    patch.setenv("TRITON_INTERPRET", "1")
    from pivottrace_verl.attention import device_layers, kernel  # noqa: F401
    from pivottrace_verl.attention.device_capture import _COMMON, DeviceCapture  # noqa: F401

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


class Nothing:
    """A kernel that is not launched: Triton's interpreter works with torch itself."""

    def __getitem__(self, grid):
        return lambda *args, **constants: None
