"""The Triton kernel, in Triton's interpreter, writes what the torch reference computes.

The interpreter proves what the kernel computes; that it compiles for CUDA is `kernel_compiles.py`'s
business. Neither says anything of its speed, or of a run on a GPU.
"""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.attention.keys import StridedKeys
from pivottrace_verl.attention.reference import (
    ScoreRule,
    group_heads,
    plan_rows,
    row_statistics,
    token_statistics,
)
from pivottrace_verl.pivots import FEATURES

if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
with pytest.MonkeyPatch.context() as patch:
    # Kernels are interpreted if this is set where they are defined...
    patch.setenv("TRITON_INTERPRET", "1")
    from pivottrace_verl.attention.kernel import Batch, RowKernel, group_shares, write_tokens


# ... and when one is first launched; Triton's own library: tests/conftest.py.
pytestmark = pytest.mark.usefixtures("interpreted")


UNTOUCHED = -7.0
LAYOUTS = ("NHD", "HND", "columns")


def make_keys(layout, n_blocks, block_size, kv_heads, size, generator, dtype=torch.float32):
    """Random keys as a view [blocks, block_size, H_kv, D] of a cache of one of vLLM's layouts."""
    if layout == "NHD":  # [blocks, 2, block_size, H_kv, D]: vLLM up to 0.24
        cache = torch.randn(n_blocks, 2, block_size, kv_heads, size, generator=generator)
        view = cache.to(dtype)[:, 0]
    elif layout == "HND":  # [blocks, H_kv, block_size, 2 D]
        cache = torch.randn(n_blocks, kv_heads, block_size, 2 * size, generator=generator)
        view = cache.to(dtype)[..., :size].transpose(1, 2)
    else:  # the CPU backend's: one column a token
        cache = torch.randn(n_blocks, kv_heads, size, block_size, generator=generator)
        view = cache.to(dtype).permute(0, 3, 1, 2)
    return StridedKeys(view)


class Case:
    """A ragged, padded batch: per request (tokens so far, tokens of this step, prompt length)."""

    def __init__(self, requests, block_size, generator, padding=0, padding_tokens=0):
        n = len(requests)
        per_row = [-(-length // block_size) for length, _, _ in requests]
        self.n_blocks = sum(per_row) + 1
        order = iter((torch.randperm(self.n_blocks - 1, generator=generator) + 1).tolist())
        table = torch.zeros(n + padding, max(per_row) + 1, dtype=torch.int32)
        starts, slots = [0], []
        for r, (length, new, _) in enumerate(requests):
            table[r, : per_row[r]] = torch.tensor([next(order) for _ in range(per_row[r])])
            for position in range(length - new, length):
                slots.append(int(table[r, position // block_size]) * block_size)
                slots[-1] += position % block_size
            starts.append(len(slots))
        self.n_slots, self.n_tokens = self.n_blocks * block_size, len(slots) + padding_tokens
        self.batch = Batch(
            torch.tensor(starts + starts[-1:] * padding, dtype=torch.int32),
            torch.tensor([q[0] for q in requests] + [0] * padding, dtype=torch.int32),
            table,
            torch.tensor(slots + [-1] * padding_tokens, dtype=torch.int64),
            torch.tensor([q[2] for q in requests] + [-1] * padding, dtype=torch.int32),
            # Some go on with a response that the prompt begins.
            torch.tensor(
                [max(0, q[2] - 3 * (r % 2)) for r, q in enumerate(requests)] + [-1] * padding,
                dtype=torch.int32,
            ),
        )
        self.requests, self.block_size = requests, block_size

    def rows(self, rows_per_request=1):
        """(request, token, position) of each row that chooses a token and was asked for."""
        for r, (length, new, prompt) in enumerate(self.requests):
            for back in range(min(new, rows_per_request)):
                if prompt >= 0 and length - 1 - back >= prompt - 1:
                    yield r, int(self.batch.starts[r + 1]) - 1 - back, length - 1 - back


def expected(case, query, keys, rule, config, groups, rows_per_request=1, sliding_window=None):
    """The store [slots, G, F] as the reference fills it."""
    out = torch.full((case.n_slots, len(groups), len(FEATURES)), UNTOUCHED)
    rows = list(case.rows(rows_per_request))
    if not rows:
        return out
    requests, tokens, positions = (torch.tensor(part) for part in zip(*rows, strict=True))
    plan = plan_rows(
        case.batch.table[requests],
        positions,
        case.batch.responses[requests],
        case.block_size,
        config,
        sliding_window,
    )
    found = group_heads(row_statistics(query[tokens], keys, plan, rule), groups)
    out[case.batch.slots[tokens]] = found
    return out


def fill(case, query, keys, rule, config, groups, sliding_window=None, **options):
    """The store as the kernel fills it, between two layers that it must leave alone."""
    store = torch.full((case.n_slots, 3, len(groups), len(FEATURES)), UNTOUCHED)
    n_requests = len(case.batch.lengths)
    kernel = RowKernel(config, query.shape[1], n_requests, "cpu", tile=16, **options)
    shares = group_shares(groups, query.shape[1])
    # Scratch holds whatever memory held.
    kernel._state.fill_(torch.nan)
    kernel(query, keys, rule, case.batch, shares, store[:, 1], sliding_window)
    assert bool((store[:, ::2] == UNTOUCHED).all())
    return store[:, 1]


def worst(found, wanted, config):
    error = (found - wanted).abs()
    for i, name in enumerate(FEATURES):
        if name.endswith("distance"):
            error[..., i] /= config.window
    return float(error.max())


@settings(max_examples=40, deadline=None, phases=[Phase.generate])
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1), (3, 3)]),
    size=st.sampled_from([16, 24]),
    block_size=st.sampled_from([16, 32]),
    layout=st.sampled_from(LAYOUTS),
    window=st.sampled_from([1, 8, 32]),
    sink=st.integers(0, 5),
    soft_cap=st.sampled_from([0.0, 2.0]),
    sliding_window=st.sampled_from([None, None, 1, 20]),
    learnt=st.sampled_from([None, 0.0, 60.0]),
    splits=st.sampled_from([1, 3]),
    rows_per_request=st.sampled_from([1, 1, 3]),
    padding=st.integers(0, 2),
    data=st.data(),
)
def test_the_store_is_what_the_reference_computes(
    lengths,
    heads,
    size,
    block_size,
    layout,
    window,
    sink,
    soft_cap,
    sliding_window,
    learnt,
    splits,
    rows_per_request,
    padding,
    data,
):
    config = CaptureConfig(window=window, sink=sink)
    requests = []
    for length in lengths:
        new = data.draw(st.integers(1, min(length, 5)))
        # -1: not asked for; beyond the length: a prompt that is not read to its end yet.
        prompt = data.draw(st.one_of(st.just(-1), st.integers(1, length + 1)))
        requests.append((length, new, prompt))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    case = Case(requests, block_size, g, padding, padding_tokens=2 * padding)
    n_heads, kv_heads = heads
    keys = make_keys(layout, case.n_blocks, block_size, kv_heads, size, g)
    query = torch.randn(case.n_tokens, n_heads, size, generator=g)
    sinks = None if learnt is None else learnt + torch.randn(n_heads, generator=g)
    rule = ScoreRule(0.4, soft_cap, sinks)
    last = n_heads - 1
    one, two = ((last,),), ((0,), (last, 0)) if last else ((0,), (0,))
    groups = data.draw(st.sampled_from([(tuple(range(n_heads)),), one, two]))
    wanted = expected(case, query, keys, rule, config, groups, rows_per_request, sliding_window)
    found = fill(
        case,
        query,
        keys,
        rule,
        config,
        groups,
        sliding_window,
        splits=splits,
        rows_per_request=rows_per_request,
    )
    assert torch.equal(found == UNTOUCHED, wanted == UNTOUCHED)
    assert worst(found, wanted, config) < 2e-5


def plain(lengths=(90, 33, 7), dtype=torch.float32, seed=0, heads=4, kv_heads=2, size=32):
    """A decode batch without anything unusual: (case, query, keys)."""
    g = torch.Generator().manual_seed(seed)
    case = Case([(n, 1, max(1, n // 3)) for n in lengths], 16, g)
    keys = make_keys("HND", case.n_blocks, 16, kv_heads, size, g, dtype)
    return case, torch.randn(case.n_tokens, heads, size, generator=g).to(dtype), keys


CONFIG, RULE, GROUPS = CaptureConfig(), ScoreRule(0.25), ((0, 1, 2, 3),)
SHARES = group_shares(GROUPS, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_queries_and_keys_are_added_up_in_float32(dtype):
    case, query, keys = plain(dtype=dtype)
    wanted = expected(case, query, keys, RULE, CONFIG, GROUPS)
    assert worst(fill(case, query, keys, RULE, CONFIG, GROUPS), wanted, CONFIG) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_keys_are_read_with_their_scale(dtype):
    case, query, keys = plain()
    keys = StridedKeys((keys.view * 8).to(dtype), torch.tensor([1 / 8]))
    wanted = expected(case, query, keys, RULE, CONFIG, GROUPS)
    assert worst(fill(case, query, keys, RULE, CONFIG, GROUPS), wanted, CONFIG) < 2e-5


def test_fp8_queries_are_read_with_their_scale():
    case, query, keys = plain()
    keys = StridedKeys((keys.view * 8).to(torch.float8_e4m3fn), torch.tensor(1 / 8))
    query, scale = (query * 4).to(torch.float8_e4m3fn), torch.tensor(1 / 4)
    wanted = expected(case, query.float() * scale, keys, RULE, CONFIG, GROUPS)
    store = torch.full((case.n_slots, 1, len(FEATURES)), UNTOUCHED)
    kernel = RowKernel(CONFIG, 4, 3, "cpu", splits=2, tile=16)
    kernel(query, keys, RULE, case.batch, SHARES, store, query_scale=scale)
    assert worst(store, wanted, CONFIG) < 2e-5


def test_where_rows_were_written_is_told_and_nothing_of_the_others():
    case, query, keys = plain((20, 9, 33))
    case.batch.prompts[1] = -1
    written = torch.full((3,), -1, dtype=torch.int32)
    store = torch.full((case.n_slots, 1, len(FEATURES)), UNTOUCHED)
    kernel = RowKernel(CONFIG, 4, 3, "cpu", splits=2, tile=16)
    kernel(query, keys, RULE, case.batch, SHARES, store, written=written)
    assert written.tolist() == [int(case.batch.slots[0]), -1, int(case.batch.slots[2])]


@settings(max_examples=25, deadline=None, phases=[Phase.generate])
@given(
    n_words=st.integers(1, 90),
    n_rows=st.integers(1, 4),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    masked=st.sampled_from([0.0, 0.5, 0.95]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_token_statistics_are_those_of_torch_at_the_rows_slots(
    n_words, n_rows, spread, masked, dtype, seed, data
):
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(n_rows, n_words + 7, generator=g) * spread + 3).to(dtype)[:, 7:]
    mask = torch.rand(n_rows, n_words, generator=g) < masked
    mask[:, data.draw(st.integers(0, n_words - 1))] = False
    logits[mask] = -torch.inf
    slots = torch.randperm(12, generator=g)[:n_rows].to(torch.int32)
    asked = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n_rows, max_size=n_rows)))
    slots[~asked] = -1
    tokens, owner = torch.full((12, 2), UNTOUCHED), torch.zeros(12, dtype=torch.int32)
    write_tokens(logits, slots, torch.arange(5, 5 + n_rows).int(), tokens, owner, tile=16)
    wanted, owners = torch.full((12, 2), UNTOUCHED), torch.zeros(12, dtype=torch.int32)
    if bool(asked.any()):
        wanted[slots[asked].long()] = token_statistics(logits.float())[asked]
        owners[slots[asked].long()] = torch.arange(5, 5 + n_rows).int()[asked]
    assert torch.equal(owner, owners)
    torch.testing.assert_close(tokens, wanted, atol=2e-5, rtol=1e-6)


@pytest.mark.parametrize("far", ["heads", "tokens"])
def test_keys_that_lie_further_apart_than_32_bits_count_are_read(far):
    g, step = torch.Generator().manual_seed(0), (1 << 30) + 8
    # One block of three heads and tokens, the last of which begins past 2 ** 31. Pages that nobody
    # writes take no memory.
    memory = torch.empty(2 * step + 64, dtype=torch.float8_e4m3fn)
    strides = (48, 16, step, 1) if far == "heads" else (48, step, 16, 1)
    view = memory.as_strided((1, 3, 3, 16), strides)
    view.copy_(torch.randn(view.shape, generator=g).to(view.dtype))
    case = Case([(3, 1, 1)], 3, g)
    case.batch.table[0, 0], case.batch.slots[0] = 0, 2
    keys, groups = StridedKeys(view, torch.tensor(1.0)), ((0,), (2,))
    query = torch.randn(case.n_tokens, 3, 16, generator=g)
    wanted = expected(case, query, keys, RULE, CONFIG, groups)
    assert worst(fill(case, query, keys, RULE, CONFIG, groups), wanted, CONFIG) < 2e-5


def test_strided_queries_and_a_16_bit_store_are_fine():
    case, query, keys = plain()
    wanted = expected(case, query, keys, RULE, CONFIG, GROUPS)
    fused = torch.cat([query, query.flip(1)], dim=1)[:, :4]  # a slice of q, k and v in one
    store = torch.full((case.n_slots, 1, len(FEATURES)), UNTOUCHED, dtype=torch.float16)
    kernel = RowKernel(CONFIG, 4, 3, "cpu", splits=2, tile=16)
    kernel(fused, keys, RULE, case.batch, SHARES, store)
    assert worst(store.float(), wanted, CONFIG) < 5e-3


def test_scratch_left_by_a_longer_batch_does_not_leak_into_the_next():
    kernel = RowKernel(CONFIG, 4, 3, "cpu", splits=4, tile=16)
    for lengths in ((90, 80, 70), (5, 1, 2), (33, 90, 1)):
        case, query, keys = plain(lengths)
        store = torch.full((case.n_slots, 1, len(FEATURES)), UNTOUCHED)
        kernel(query, keys, RULE, case.batch, SHARES, store)
        wanted = expected(case, query, keys, RULE, CONFIG, GROUPS)
        assert worst(store, wanted, CONFIG) < 2e-5


def test_keys_beyond_a_row_do_not_count_whatever_they_hold():
    case, query, keys = plain((20,))
    before = fill(case, query, keys, RULE, CONFIG, GROUPS)
    keys.view[int(case.batch.table[0, 1]), 4:] = torch.nan
    assert torch.equal(fill(case, query, keys, RULE, CONFIG, GROUPS), before)


def test_a_dominant_sink_leaves_the_rest_accurate():
    case, query, keys = plain((90,))
    keys.view[int(case.batch.table[0, 0]), 0] = 9 * query[0, ::2]
    wanted = expected(case, query, keys, RULE, CONFIG, GROUPS)
    row = wanted[wanted[:, 0, 0] != UNTOUCHED][0, 0]
    assert float(row[FEATURES.index("sink_mass")]) > 0.5
    assert worst(fill(case, query, keys, RULE, CONFIG, GROUPS, splits=2), wanted, CONFIG) < 2e-5


def test_what_does_not_fit_is_refused_before_the_launch():
    case, query, keys = plain()
    kernel = RowKernel(CONFIG, 4, 2, "cpu")
    store = torch.zeros(case.n_slots, 1, len(FEATURES))
    with pytest.raises(ValueError, match="3 rows of 4 heads do not fit"):
        kernel(query, keys, RULE, case.batch, SHARES, store)
    kernel = RowKernel(CONFIG, 4, 3, "cpu")
    with pytest.raises(ValueError, match="holds"):
        kernel(query, keys, RULE, case.batch, SHARES, store[..., :3])
    with pytest.raises(ValueError, match="do not go with keys"):
        kernel(query, replace(keys, view=keys.view[..., :16]), RULE, case.batch, SHARES, store)


def test_the_rest_of_the_package_does_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import pivottrace_verl.attention.vllm_hooks, pivottrace_verl.attention.replay\n"
        "import pivottrace_verl.cli, pivottrace_verl.doctor"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_it_compiles_for_cuda_and_spills_a_few_registers_at_most(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    told = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kernel_compiles.py"))],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr[-2000:]
    lines = told.stdout.splitlines()
    assert len(lines) == 16
    spilled = {line.partition(" REG")[0]: _stack(line) for line in lines}
    assert all(n <= 32 if "walk" in name else n == 0 for name, n in spilled.items()), spilled


def _stack(line):
    """Bytes of a thread's stack, where spilled registers go."""
    return int(line.partition("STACK:")[2].split()[0])
