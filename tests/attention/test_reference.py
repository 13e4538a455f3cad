"""The paged row statistics equal the dense definitions, and the definitions mean what they say."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pivottrace_verl.attention import cpu_kernel
from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.attention.cpu_rows import (
    MANY_PRODUCTS,
    CompiledRows,
    LayerRows,
    StepRows,
    compiled_rows,
)
from pivottrace_verl.attention.first_rows import check_complete, check_row, dense_row
from pivottrace_verl.attention.keys import LAYOUTS, PagedKeys, StridedKeys, find_layout
from pivottrace_verl.attention.reference import (
    ScoreRule,
    dense_statistics,
    group_heads,
    plan_rows,
    row_statistics,
    token_statistics,
)
from pivottrace_verl.pivots import FEATURES

RULE = ScoreRule(scale=0.25)


def put(cache, layout, block, head, offset, key):
    """Write one key [D] element by element, as the layouts are documented."""
    block_size, size = cache.shape[2], cache.shape[3] // 2
    half = cache[block, head].view(-1)[: block_size * size]
    d = torch.arange(size)
    if layout == "columns":
        half[d * block_size + offset] = key
    else:
        tile, column = offset // 16, offset % 16
        half[tile * 16 * size + d // 2 * 32 + column * 2 + d % 2] = key


def make_pages(lengths, kv_heads, size, block_size, seed, layout="columns", spread=1.0):
    """Keys of a ragged batch, dense and in shuffled pages: ([H_kv, S, D] each, pages, table)."""
    g = torch.Generator().manual_seed(seed)
    keys = [torch.randn(kv_heads, n, size, generator=g) * spread for n in lengths]
    per_row = [-(-n // block_size) for n in lengths]
    order = (torch.randperm(sum(per_row) + 2, generator=g) + 1).tolist()
    cache = torch.full((len(order) + 1, kv_heads, block_size, 2 * size), 7.5)
    table = torch.zeros(len(lengths), max(per_row) + 1, dtype=torch.int32)
    used = iter(order)
    for r, rows in enumerate(keys):
        for position in range(lengths[r]):
            b, offset = divmod(position, block_size)
            if offset == 0:
                table[r, b] = next(used)
            for head in range(kv_heads):
                put(cache, layout, int(table[r, b]), head, offset, rows[head, position])
    return keys, PagedKeys(cache, layout), table


def as_view(pages):
    """The same keys as a view without an order of its own: [blocks, block_size, H_kv, D]."""
    n_blocks, kv_heads, block_size, double = pages.cache.shape
    size, head = double // 2, block_size * double
    strides = (kv_heads * head, 1, head, block_size)
    return StridedKeys(pages.cache.as_strided((n_blocks, block_size, kv_heads, size), strides))


def dense(query, keys, position, prompt, config, rule=RULE, sliding_window=None):
    """Dense statistics of one query [H, D] over keys [H_kv, S, D]: [H, F]."""
    k = keys.repeat_interleave(query.shape[0] // keys.shape[0], 0)[:, : position + 1].double()
    scores = torch.einsum("hd,hsd->hs", query.double(), k) * rule.scale
    if rule.soft_cap:
        scores = rule.soft_cap * torch.tanh(scores / rule.soft_cap)
    if sliding_window is not None:
        scores[:, : max(0, position + 1 - sliding_window)] = -torch.inf
    if rule.sinks is None:
        rows, learnt = scores.softmax(-1), None
    else:
        scores = torch.cat([scores, rule.sinks.double()[:, None]], 1)
        rows, learnt = scores.softmax(-1)[:, :-1], scores.softmax(-1)[:, -1:]
    lse = scores.logsumexp(-1)[:, None]
    position = torch.tensor([position])
    return dense_statistics(rows[:, None], lse, position, prompt, config, learnt)[0]


def make_compiled(layout, rule, sliding_window, groups, n_heads, config):
    layer = LayerRows(layout, rule, sliding_window, groups, n_heads)
    return CompiledRows(cpu_kernel, [layer], config)


def compiled_rows_of(compiled, query, cache, step):
    """[N, G, F] as they are written, among slots that stay as they were."""
    slots, n_groups = torch.randperm(2 * len(query))[: len(query)], len(compiled.layers[0].groups)
    stats = torch.full((2 * len(query), 1, n_groups, len(FEATURES)), -7.0)
    compiled.write_rows(0, query, cache, step, stats, slots)
    assert int((stats == -7.0).all(-1).sum()) == n_groups * len(query)
    return stats[slots, 0]


def worst(found, expected, config):
    error = (found - expected).abs()
    for i, name in enumerate(FEATURES):
        if name.endswith("distance"):
            error[..., i] /= config.window
    return float(error.max())


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=5),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1), (4, 4)]),
    size=st.sampled_from([8, 32]),
    block_size=st.sampled_from([16, 32, 128]),
    window=st.sampled_from([1, 8, 32]),
    sink=st.integers(0, 6),
    layout=st.sampled_from([*LAYOUTS, "strided"]),
    soft_cap=st.sampled_from([0.0, 0.0, 2.0]),
    sliding_window=st.sampled_from([None, None, 1, 40]),
    learnt=st.sampled_from([None, None, 0.0, 100.0]),
    data=st.data(),
)
def test_paged_rows_equal_dense_rows(
    lengths, heads, size, block_size, window, sink, layout, soft_cap, sliding_window, learnt, data
):
    config = CaptureConfig(window=window, sink=sink)
    n_heads, kv_heads = heads
    seed = data.draw(st.integers(0, 1000))
    stored = "columns" if layout == "strided" else layout
    keys, pages, table = make_pages(lengths, kv_heads, size, block_size, seed, stored)
    if layout == "strided":
        pages = as_view(pages)
    # Any row of any request, several of one request too: that is a chunk of a prompt.
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=8))
    positions = [data.draw(st.integers(0, lengths[r] - 1)) for r in rows]
    prompts = [data.draw(st.integers(1, lengths[r] + 2)) for r in rows]
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(len(rows), n_heads, size, generator=g)
    sinks = None if learnt is None else learnt + torch.randn(n_heads, generator=g)
    rule = ScoreRule(0.25, soft_cap, sinks)
    plan = plan_rows(
        table[rows],
        torch.tensor(positions),
        torch.tensor(prompts),
        block_size,
        config,
        sliding_window,
    )
    found = row_statistics(query, pages, plan, rule)
    expected = torch.stack(
        [
            dense(query[i], keys[r], positions[i], prompts[i], config, rule, sliding_window)
            for i, r in enumerate(rows)
        ]
    )
    assert found.shape == (len(rows), n_heads, len(FEATURES))
    assert worst(found, expected, config) < 2e-5
    if layout != "strided":
        groups = tuple((head,) for head in range(n_heads))
        compiled = make_compiled(layout, rule, sliding_window, groups, n_heads, config)
        step = StepRows(table[rows].numpy(), positions, np.array(prompts), block_size, config)
        for many in (True, False):
            step.n_keys = MANY_PRODUCTS if many else 0
            found = compiled_rows_of(compiled, query, pages.cache, step)
            assert worst(found, expected, config) < 2e-5


def test_compiled_rows_average_the_heads_of_each_group_and_read_bfloat16():
    config = CaptureConfig()
    groups = ((0,), (1, 5), (2, 3, 4))
    for layout in LAYOUTS:
        _, pages, table = make_pages([100, 70], 2, 32, 32, 0, layout)
        half = PagedKeys(pages.cache.bfloat16(), layout)
        query = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
        step = StepRows(table.numpy(), [99, 40], np.array([10, 60]), 32, config)
        rows = row_statistics(query, half, step.plan(None), RULE)
        compiled = make_compiled(layout, RULE, None, groups, 6, config)
        found = compiled_rows_of(compiled, query, half.cache, step)
        assert worst(found, group_heads(rows, groups), config) < 2e-5
        # A key head none of whose query heads is wanted is not read.
        half.cache[:, 1] = torch.nan
        compiled = make_compiled(layout, RULE, None, ((0, 2),), 6, config)
        found = compiled_rows_of(compiled, query, half.cache, step)
        assert worst(found, group_heads(rows, ((0, 2),)), config) < 2e-5


def test_compiled_token_statistics_are_those_of_softmax_with_masked_words_left_out():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 5000, generator=g) * 4
    logits[1, 100:4999] = -torch.inf  # a whole stretch, and the largest comes last
    logits[1, 4999] = 20.0
    logits[2, ::2] = -torch.inf
    compiled = make_compiled("columns", RULE, None, ((0,),), 1, CaptureConfig())
    for dtype in (torch.float32, torch.bfloat16):
        own = logits.to(dtype)
        found = torch.zeros(6, 2)
        compiled.write_tokens(own, torch.tensor([3, 1, 2]), found, torch.tensor([5, 0, 2]))
        assert torch.allclose(found[[5, 0, 2]], token_statistics(own)[[3, 1, 2]], atol=2e-5)
        assert not found[[1, 3, 4]].any()
        every = torch.zeros(4, 2)
        compiled.write_tokens(own, None, every, torch.arange(4))
        assert torch.equal(every[1:], found[[0, 2, 5]])


@pytest.mark.parametrize("sliding_window", [None, 9])
@pytest.mark.parametrize("rule", [RULE, ScoreRule(0.25, 3.0), ScoreRule(0.25, 0.0, torch.ones(4))])
def test_a_first_prompt_passes_with_its_own_row_and_fails_with_another(rule, sliding_window):
    config = CaptureConfig()
    keys, pages, table = make_pages([70], 2, 32, 32, 0)
    query = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(1))
    expected = dense_row(query[0], keys[0].transpose(0, 1), 70, rule, sliding_window, config)
    for position in (69, 68):
        positions, prompt = torch.tensor([position]), torch.tensor([70])
        plan = plan_rows(table, positions, prompt, 32, config, sliding_window)
        captured = row_statistics(query, pages, plan, rule)[0]
        if position == 69:
            check_row(captured, expected, 3, config.window)
        else:
            with pytest.raises(RuntimeError, match=r"layer 3 .*pivottrace.capture.enable=false"):
                check_row(captured, expected, 3, config.window)


def test_a_first_request_with_missing_rows_stops_the_engine():
    check_complete("a", 5, 0)
    with pytest.raises(RuntimeError, match=r"3 rows for the 5 tokens .* 'a'"):
        check_complete("a", 5, 2)


def test_compiled_rows_are_proved_before_they_are_used(monkeypatch):
    caches = [torch.zeros(4, 2, 32, 64)] * 2
    config = CaptureConfig()
    layers = [LayerRows("columns", RULE, window, ((0, 1),), 4) for window in (None, 8)]
    assert compiled_rows(caches, layers, config) is not None
    assert compiled_rows([cache.half() for cache in caches], layers, config) is None
    monkeypatch.setattr(
        cpu_kernel, "layer_rows", lambda *shape: lambda *arguments: arguments[-3].fill(1.0)
    )
    with pytest.raises(RuntimeError, match=r"wrong rows at start .*capture.enable=false"):
        compiled_rows(caches, layers, config)


def test_a_chunk_of_rows_gives_the_same_numbers_as_all_at_once(monkeypatch):
    config = CaptureConfig()
    _, pages, table = make_pages([100, 70, 3], 2, 32, 32, 0)
    positions, prompts = torch.tensor([99, 69, 2]), torch.tensor([10, 60, 3])
    query = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(1))
    plan = plan_rows(table, positions, prompts, 32, config)
    whole = row_statistics(query, pages, plan, RULE)
    monkeypatch.setattr("pivottrace_verl.attention.reference.CHUNK_ELEMENTS", 1)
    assert torch.allclose(row_statistics(query, pages, plan, RULE), whole, atol=1e-6)


def test_ratios_keep_their_accuracy_when_the_sink_takes_almost_everything():
    # 1 - sink_mass is about 1e-5 here: computed as a difference, float32 would lose it.
    config = CaptureConfig()
    keys, pages, table = make_pages([120], 1, 8, 32, 3, spread=0.3)
    query = torch.ones(1, 1, 8)
    keys[0][0, 0] = 8.0
    put(pages.cache, "columns", int(table[0, 0]), 0, 0, torch.full((8,), 8.0))
    plan = plan_rows(table, torch.tensor([119]), torch.tensor([20]), 32, config)
    found = row_statistics(query, pages, plan, RULE)[0]
    expected = dense(query[0], keys[0], 119, 20, config)
    assert 1e-6 < 1 - float(expected[0, FEATURES.index("sink_mass")]) < 1e-4
    assert worst(found, expected, config) < 1e-5


def test_keys_beyond_a_row_do_not_count_however_large():
    config = CaptureConfig()
    _, pages, table = make_pages([40], 1, 8, 32, 0)
    query = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(0))
    plan = plan_rows(table, torch.tensor([10]), torch.tensor([5]), 32, config)
    before = row_statistics(query, pages, plan, RULE)
    for offset in range(11, 32):
        put(pages.cache, "columns", int(table[0, 0]), 0, offset, torch.full((8,), 1e6))
    assert torch.equal(row_statistics(query, pages, plan, RULE), before)


def test_uniform_attention_gives_the_values_counted_by_hand():
    # t = 9, P = 6, S = 2, W = 3: ten keys of 1/10 each.
    config = CaptureConfig(window=3, sink=2)
    a = torch.full((1, 1, 10), 0.1)
    rows = dense_statistics(a, torch.tensor([[math.log(10)]]), torch.tensor([9]), 6, config)
    found = dict(zip(FEATURES, rows[0, 0].tolist(), strict=True))
    assert found["lse"] == pytest.approx(math.log(10))
    assert found["entropy"] == pytest.approx(math.log(10))
    assert found["max_prob"] == pytest.approx(0.1)
    assert found["sink_mass"] == pytest.approx(0.2)
    assert found["prompt_mass"] == pytest.approx(0.6)
    assert found["long_mass"] == pytest.approx(5 / 8)  # keys 2..6 of 2..9
    assert found["distance"] == pytest.approx((0 + 1 + 2 + 3 * 5) / 8)
    assert found["response_long_mass"] == pytest.approx(1 / 4)  # key 6 of 6..9
    assert found["response_distance"] == pytest.approx((0 + 1 + 2 + 3) / 4)
    buckets = [found[f"bucket_{b}"] for b in range(16)]
    assert buckets[:5] == pytest.approx([0.1, 0.1, 0.2, 0.4, 0.2])
    assert sum(buckets) == pytest.approx(1)


def test_a_learnt_sink_takes_its_share_and_has_no_place():
    # Five keys of 1/10 each, the learnt sink has the other half.
    config = CaptureConfig(window=3, sink=1)
    a, half = torch.full((1, 1, 5), 0.1), torch.tensor([[0.5]])
    rows = dense_statistics(a, torch.zeros(1, 1), torch.tensor([4]), 2, config, half)
    found = dict(zip(FEATURES, rows[0, 0].tolist(), strict=True))
    assert found["entropy"] == pytest.approx(0.5 * math.log(10) + 0.5 * math.log(2))
    assert found["max_prob"] == pytest.approx(0.1)
    assert found["sink_mass"] == pytest.approx(0.6)
    assert found["prompt_mass"] == pytest.approx(0.2)
    assert found["long_mass"] == pytest.approx(1 / 4)  # key 1 of 1..4
    assert sum(found[f"bucket_{b}"] for b in range(16)) == pytest.approx(0.5)


def test_the_last_prompt_row_has_no_response_keys_and_says_zero():
    config = CaptureConfig()
    a = torch.full((1, 1, 50), 1 / 50)
    rows = dense_statistics(a, torch.zeros(1, 1), torch.tensor([49]), 50, config)
    found = dict(zip(FEATURES, rows[0, 0].tolist(), strict=True))
    assert found["response_long_mass"] == found["response_distance"] == 0
    assert found["prompt_mass"] == pytest.approx(1)


def test_a_head_group_is_the_mean_of_its_heads():
    rows = torch.arange(12.0).view(1, 4, 3)
    grouped = group_heads(rows, ((0, 2), (3,)))
    assert torch.equal(grouped[0, 0], (rows[0, 0] + rows[0, 2]) / 2)
    assert torch.equal(grouped[0, 1], rows[0, 3])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_of_the_keys_is_found_by_writing_and_reading_and_the_cache_restored(layout):
    cache = torch.full((4, 2, 32, 16), 3.0)

    def write(keys, values, slots):
        for key, slot in zip(keys, slots.tolist(), strict=True):
            for head in range(2):
                put(cache, layout, slot // 32, head, slot % 32, key[head])

    assert find_layout(cache, write) == layout
    assert bool((cache == 3.0).all())


def test_a_layout_that_is_not_known_is_not_guessed():
    cache = torch.full((4, 2, 32, 16), 3.0)

    def row_by_row(keys, values, slots):
        cache[slots // 32, :, slots % 32, :8] = keys

    assert find_layout(cache, row_by_row) is None
    assert bool((cache == 3.0).all())
    assert find_layout(cache.transpose(0, 1), row_by_row) is None


def test_compiled_rows_share_torchs_threads_and_leave_them_as_they_were():
    """In a process of its own: threads are of the process."""
    code = """
import ctypes, os, sys
import numpy as np
import torch

n_threads = int(sys.argv[1])
import scipy.linalg  # has threads of its own
torch.set_num_threads(n_threads)
torch.randn(600, 600) @ torch.randn(600, 600)
from pivottrace_verl.attention import cpu_kernel
from pivottrace_verl.attention.cpu_rows import CompiledRows
from pivottrace_verl.attention.config import CaptureConfig
from numba import get_num_threads

open_mp = ctypes.CDLL(None)
before = len(os.listdir("/proc/self/task")), open_mp.omp_get_nested()
compiled = CompiledRows(cpu_kernel, [], CaptureConfig())
idle = get_num_threads()
tokens = torch.zeros(8, 2)
for n_words in (50, 50_000):
    compiled.write_tokens(torch.randn(8, n_words), None, tokens, torch.arange(8))
    assert tokens.all()
now = len(os.listdir("/proc/self/task")), open_mp.omp_get_nested()
assert now == before, (before, now)
assert torch.get_num_threads() == n_threads
assert get_num_threads() == idle
for many in (True, False):
    compiled._threads.run(many, lambda: print(get_num_threads()))
"""
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2"}
    for n_threads in (1, 2):
        found = subprocess.run(
            [sys.executable, "-c", code, str(n_threads)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        assert found.returncode == 0, found.stderr
        assert found.stdout.split() == [str(n_threads), "1"]
