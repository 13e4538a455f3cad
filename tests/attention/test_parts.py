"""What several workers captured, joined, is what one worker would have captured."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pivottrace_verl.attention.parts import Part, Place, divide, merge, own_heads


def capture(heads_rows, groups, tokens):
    """Group means over all heads: rows of each layer [T, heads, F] -> stats [T, L, H, F]."""
    means = [
        np.stack([rows[:, list(group)].mean(1) for group in own], axis=1)
        for rows, own in zip(heads_rows, groups, strict=True)
    ]
    return np.stack(means, axis=1).astype(np.float32), tokens


def capture_part(part, heads_rows, groups, n_heads, rank, tokens):
    """What the worker of tensor rank `rank` sends: NaN for a group of which it has no head."""
    stats = np.full((len(tokens), len(part.layers), len(groups[0]), 3), np.nan, np.float32)
    for place, layer in enumerate(part.layers):
        own = heads_rows[layer][:, rank * n_heads : (rank + 1) * n_heads]
        for number, group in enumerate(own_heads(groups[layer], n_heads, rank)):
            if group:
                stats[:, place, number] = own[:, list(group)].mean(1)
    return part, stats, tokens if part.tokens else np.zeros_like(tokens)


@st.composite
def engines(draw):
    tensor_size, n_stages = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    n_heads = draw(st.integers(1, 3))
    n_layers, n_groups = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    group = st.lists(
        st.integers(0, n_heads * tensor_size - 1), min_size=1, max_size=6, unique=True
    ).map(tuple)
    groups = [tuple(draw(group) for _ in range(n_groups)) for _ in range(n_layers)]
    stages = [draw(st.integers(0, n_stages - 1)) for _ in range(n_layers)]
    return tensor_size, n_stages, n_heads, groups, stages, draw(st.integers(0, 99))


@given(engines())
@settings(max_examples=150, deadline=None)
def test_joined_parts_equal_the_capture_of_one_worker(engine):
    tensor_size, n_stages, n_heads, groups, stages, seed = engine
    g = np.random.default_rng(seed)
    rows = [g.normal(size=(5, n_heads * tensor_size, 3)) for _ in groups]
    tokens = g.normal(size=(5, 2)).astype(np.float32)
    parts = divide(stages, groups, n_heads, Place(0, tensor_size, 0, n_stages))
    sent = [
        capture_part(part, rows, groups, n_heads, worker % tensor_size, tokens)
        for worker, part in enumerate(parts)
        if part is not None
    ]
    assert {part.of for part, _, _ in sent} == {len(sent)}
    assert [part.number for part, _, _ in sent] == list(range(len(sent)))
    g.shuffle(sent)
    stats, token_statistics = merge(sent)
    expected, _ = capture(rows, groups, tokens)
    assert np.allclose(stats, expected, atol=1e-5)
    assert np.array_equal(token_statistics, tokens)


def test_a_worker_without_traced_heads_or_logits_sends_nothing():
    parts = divide([0], [((2, 3),)], 2, Place(0, 2, 0, 2))
    assert parts == [
        None,
        Part(0, 2, (0,), ((2,),), False),
        Part(1, 2, (), (), True),
        None,
    ]


def test_one_worker_is_all_of_a_trace():
    assert divide([0, 0], [((0, 1),)] * 2, 2, Place()) == [Part(0, 1, (0, 1), ((2,), (2,)), True)]


def two_parts():
    first = Part(0, 2, (0,), ((2,),), False)
    last = Part(1, 2, (1,), ((2,),), True)
    rows = np.ones((4, 1, 1, 3), np.float32)
    return (first, rows, np.zeros((4, 2))), (last, 2 * rows, np.ones((4, 2)))


def test_rows_that_not_every_worker_has_are_cut():
    first, (last, rows, tokens) = two_parts()
    stats, token_statistics = merge([first, (last, rows[:3], tokens[:3])])
    assert stats[:, :, 0, 0].tolist() == [[1, 2]] * 3
    assert len(token_statistics) == 3


def test_parts_that_do_not_make_one_trace_are_refused():
    first, last = two_parts()
    with pytest.raises(ValueError, match="parts"):
        merge([first])
    with pytest.raises(ValueError, match="parts"):
        merge([first, first])
    other = (last[0], np.ones((4, 1, 2, 3)), last[2])
    with pytest.raises(ValueError, match="parts"):
        merge([first, other])
    no_heads = Part(1, 2, (1,), ((0,),), True)
    with pytest.raises(ValueError, match="no worker has heads"):
        merge([first, (no_heads, last[1], last[2])])
