# mypy: disable-error-code="no-untyped-def"
"""The device code of `kernel.RowKernel`, in Triton's dialect of Python.

`walk` goes once over the keys of one row, KV head and split of the context, with an online softmax
over all query heads of the KV head. Every feature but three is a sum of probability times a weight
of the key's position, so a tile of keys adds to all of them by one product of matrices: its softmax
weights times `_weights`. `merge` joins the splits, forms the features, takes the means of the head
groups and writes them at the row's slot.

Between the two stands the state, [N, splits, H, COLUMNS] float32; see the columns below.
"""

import triton
import triton.language as tl

from pivottrace_verl.attention.reference import N_BUCKETS, TINY
from pivottrace_verl.pivots import FEATURES

# Columns of the state of a (row, head): where feature f is a sum over keys, column f holds it.
LSE = tl.constexpr(FEATURES.index("lse"))
ENTROPY = tl.constexpr(FEATURES.index("entropy"))
MAX_PROB = tl.constexpr(FEATURES.index("max_prob"))
SINK_MASS = tl.constexpr(FEATURES.index("sink_mass"))
PROMPT_MASS = tl.constexpr(FEATURES.index("prompt_mass"))
LONG_MASS = tl.constexpr(FEATURES.index("long_mass"))
DISTANCE = tl.constexpr(FEATURES.index("distance"))
RESPONSE_LONG_MASS = tl.constexpr(FEATURES.index("response_long_mass"))
RESPONSE_DISTANCE = tl.constexpr(FEATURES.index("response_distance"))
BUCKET = tl.constexpr(FEATURES.index("bucket_0"))
BUCKETS = tl.constexpr(N_BUCKETS)
N_FEATURES = tl.constexpr(len(FEATURES))
PAST_SINK = tl.constexpr(len(FEATURES))
RESPONSE = tl.constexpr(len(FEATURES) + 1)
TOTAL = tl.constexpr(len(FEATURES) + 2)
TOP = tl.constexpr(len(FEATURES) + 3)
"""Where the largest score stands; the column ENTROPY holds the sum of weight * (score - top)."""
COLUMNS = tl.constexpr(32)
NO_SHARE = tl.constexpr(TINY)


@triton.jit
def _row_of(starts, lengths, slots, prompts, row, ROWS: tl.constexpr):
    """Row `row` of the grid: its request, token, position, slot, and if it counts.

    A request's rows are its last ROWS tokens of this step, newest first."""
    request = row // ROWS
    back = row % ROWS
    token = tl.load(starts + request + 1) - 1 - back
    length = tl.load(lengths + request)
    prompt = tl.load(prompts + request)
    position = length - 1 - back
    there = (length > 0) & (token >= tl.load(starts + request))
    slot = tl.load(slots + token, mask=there, other=-1)
    counts = there & (slot >= 0) & (prompt >= 0) & (position >= prompt - 1)
    return request, token, position, slot, counts


@triton.jit
def _weights(key, distance, start, window, sink):
    """[TILE, COLUMNS]: what each key's probability counts for in each column of the state; the
    response's keys begin at `start`."""
    column = tl.arange(0, COLUMNS)[None, :]
    bucket = column - BUCKET
    low = tl.where(bucket > 0, 1 << tl.maximum(bucket - 1, 0), 0)
    high = 1 << tl.minimum(tl.maximum(bucket, 0), BUCKETS - 1)
    inside = (distance >= low) & ((distance < high) | (bucket == BUCKETS - 1))
    clipped = tl.minimum(distance, window).to(tl.float32)
    far = (distance >= window).to(tl.float32)
    past_sink = (key >= sink).to(tl.float32)
    response = (key >= start).to(tl.float32)
    weight = tl.where((bucket >= 0) & (bucket < BUCKETS) & inside, 1.0, 0.0)
    weight = tl.where(column == SINK_MASS, 1.0 - past_sink, weight)
    weight = tl.where(column == PROMPT_MASS, 1.0 - response, weight)
    weight = tl.where(column == LONG_MASS, past_sink * far, weight)
    weight = tl.where(column == DISTANCE, past_sink * clipped, weight)
    weight = tl.where(column == RESPONSE_LONG_MASS, response * far, weight)
    weight = tl.where(column == RESPONSE_DISTANCE, response * clipped, weight)
    weight = tl.where(column == PAST_SINK, past_sink, weight)
    weight = tl.where(column == RESPONSE, response, weight)
    return tl.where(column == TOTAL, 1.0, weight)


@triton.jit
def _column(state, which: tl.constexpr):
    """[heads, COLUMNS] -> [heads]."""
    return tl.sum(tl.where(tl.arange(0, COLUMNS)[None, :] == which, state, 0.0), axis=1)


@triton.jit
def _move(total, score_sum, top, new_top):
    """Factor and sum of weight * (score - top) when the largest score becomes `new_top`."""
    factor = tl.where(top == -float("inf"), 0.0, tl.exp(top - new_top))
    step = tl.where(top == -float("inf"), 0.0, top - new_top)
    return factor, factor * (score_sum + step * total)


@triton.jit
def _in_a_group(shares, head, there, HEADS: tl.constexpr, GROUPS: tl.constexpr):
    """[heads] True where a head counts in one of the head groups."""
    total = tl.zeros(head.shape, tl.float32)
    for group in range(GROUPS):
        total += tl.load(shares + group * HEADS + head, mask=there, other=0.0)
    return total > 0


@triton.jit
def walk(
    query, keys, state, starts, lengths, table, slots, prompts, responses, key_scale, query_scale,
    shares,
    scale, soft_cap, query_token, query_head, query_size,
    keys_block, keys_token, keys_head, keys_size, table_row,
    block_size, window, sink, sliding_window,
    HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, SIZE_PADDED: tl.constexpr,
    TILE: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, CAPPED: tl.constexpr,
    SCALED_KEYS: tl.constexpr, SCALED_QUERY: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """State of one (row, KV head, split): [HEADS, COLUMNS], HEADS query heads of the KV head."""
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    request, token, position, _slot, counts = _row_of(starts, lengths, slots, prompts, row, ROWS)
    response = tl.load(responses + request)
    head = tl.arange(0, HEADS_PADDED)
    wanted = _in_a_group(shares, kv_head * HEADS + head, head < HEADS, HEADS * KV_HEADS, GROUPS)
    if not (counts & (tl.sum(wanted.to(tl.int32)) > 0)):
        return
    size = tl.arange(0, SIZE_PADDED)
    column = tl.arange(0, COLUMNS)[None, :]
    q = tl.load(
        query
        + token.to(tl.int64) * query_token
        + (kv_head * HEADS + head[:, None]) * query_head
        + size[None, :] * query_size,
        mask=(head[:, None] < HEADS) & (size[None, :] < SIZE),
        other=0.0,
    )
    if SCALED_KEYS:
        scale = scale * tl.load(key_scale)
    if SCALED_QUERY:
        scale = scale * tl.load(query_scale)
        q = q.to(tl.bfloat16)  # FP8 fits it exactly
    if WIDE:
        q = q.to(tl.float32)
    # Keys first..position are seen; every tile that is walked holds one of them at least.
    first = tl.where(sliding_window > 0, tl.maximum(position + 1 - sliding_window, 0), 0)
    first_tile = first // TILE
    n_tiles = position // TILE + 1 - first_tile
    per_split = (n_tiles + SPLITS - 1) // SPLITS
    begin = first_tile + split * per_split
    end = tl.minimum(begin + per_split, first_tile + n_tiles)

    top = tl.full([HEADS_PADDED], -float("inf"), tl.float32)
    score_sum = tl.zeros([HEADS_PADDED], tl.float32)
    sums = tl.zeros([HEADS_PADDED, COLUMNS], tl.float32)
    for tile in range(begin, end):
        key = tile * TILE + tl.arange(0, TILE)
        seen = (key >= first) & (key <= position)
        block = tl.load(table + request.to(tl.int64) * table_row + key // block_size, seen, other=0)
        at = block.to(tl.int64) * keys_block + (key % block_size).to(tl.int64) * keys_token
        k = tl.load(
            keys + kv_head.to(tl.int64) * keys_head + at[None, :] + size[:, None] * keys_size,
            mask=seen[None, :] & (size[:, None] < SIZE),
            other=0.0,
        )
        # FP8 fits both 16-bit formats exactly.
        scores = tl.dot(q, k.to(q.dtype), input_precision="ieee").to(tl.float32) * scale
        if CAPPED:
            # tanh from the exponential of a negative number: it cannot overflow.
            shrunk = tl.exp(-2.0 * tl.abs(scores) / soft_cap)
            capped = soft_cap * (1.0 - shrunk) / (1.0 + shrunk)
            scores = tl.where(scores < 0, -capped, capped)
        scores = tl.where(seen[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        total = _column(sums, TOTAL)
        factor, score_sum = _move(total, score_sum, top, new_top)
        below = tl.where(seen[None, :], scores - new_top[:, None], 0.0)
        weight = tl.where(seen[None, :], tl.exp(below), 0.0)
        score_sum += tl.sum(weight * below, axis=1)
        distance = position - key
        counted = _weights(key[:, None], distance[:, None], response, window, sink)
        sums = sums * factor[:, None] + tl.dot(weight, counted, input_precision="ieee")
        top = new_top
    sums = tl.where(column == ENTROPY, score_sum[:, None], sums)
    sums = tl.where(column == TOP, top[:, None], sums)
    # The place in the grid is asked for again: kept until here it would spill registers.
    at = (tl.program_id(0).to(tl.int64) * SPLITS + tl.program_id(2)) * (HEADS * KV_HEADS)
    at += tl.program_id(1) * HEADS + head
    tl.store(state + at[:, None] * COLUMNS + column, sums, mask=head[:, None] < HEADS)


@triton.jit
def merge(
    state, out, starts, lengths, slots, prompts, sinks, shares, written,
    out_slot, out_group, out_feature,
    HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, GROUPS: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, LEARNT_SINKS: tl.constexpr, TELLS: tl.constexpr,
):  # fmt: skip
    """Features of one row: splits merged, head groups averaged, written at the row's slot; TELLS:
    `written[row]` says where."""
    row = tl.program_id(0)
    _request, _token, _position, slot, counts = _row_of(starts, lengths, slots, prompts, row, ROWS)
    if not counts:
        return
    if TELLS:
        tl.store(written + row, slot.to(tl.int32))
    head = tl.arange(0, HEADS_PADDED)
    column = tl.arange(0, COLUMNS)[None, :]
    # The state of a KV head none of whose heads is wanted was not written.
    wanted = _in_a_group(shares, head, head < HEADS, HEADS, GROUPS)
    top = tl.full([HEADS_PADDED], -float("inf"), tl.float32)
    score_sum = tl.zeros([HEADS_PADDED], tl.float32)
    sums = tl.zeros([HEADS_PADDED, COLUMNS], tl.float32)
    for split in range(SPLITS):
        at = (row.to(tl.int64) * SPLITS + split) * HEADS + head
        part = tl.load(state + at[:, None] * COLUMNS + column, mask=wanted[:, None], other=0.0)
        part_top = _column(part, TOP)
        new_top = tl.maximum(top, part_top)
        # A split without keys has the top -inf and sums of 0; the first one always has some.
        factor, score_sum = _move(_column(sums, TOTAL), score_sum, top, new_top)
        part_factor, part_score_sum = _move(
            _column(part, TOTAL), _column(part, ENTROPY), part_top, new_top
        )
        score_sum += part_score_sum
        part = tl.where(column == TOP, 0.0, part)
        sums = sums * factor[:, None] + part * part_factor[:, None]
        top = new_top
    largest = tl.zeros([HEADS_PADDED], tl.float32) + 1.0
    total = tl.where(wanted, _column(sums, TOTAL), 1.0)
    past_sink, response = _column(sums, PAST_SINK), _column(sums, RESPONSE)
    if LEARNT_SINKS:
        learnt = tl.load(sinks + head, mask=head < HEADS, other=0.0).to(tl.float32)
        new_top = tl.maximum(top, learnt)
        largest, score_sum = _move(total, score_sum, top, new_top)
        sums = sums * largest[:, None]
        past_sink, response = past_sink * largest, response * largest
        weight = tl.exp(learnt - new_top)
        # Where exp is 0, so is the product, and the score may be far below.
        score_sum += weight * tl.maximum(learnt - new_top, -200.0)
        total = total * largest + weight
        sums = tl.where(column == SINK_MASS, sums + weight[:, None], sums)
        top = new_top
    of_response = (column == RESPONSE_LONG_MASS) | (column == RESPONSE_DISTANCE)
    of_past_sink = (column == LONG_MASS) | (column == DISTANCE)
    base = tl.where(of_response, response[:, None], total[:, None])
    base = tl.where(of_past_sink, past_sink[:, None], base)
    enough = base / total[:, None] > NO_SHARE
    features = tl.where(enough, sums / tl.where(enough, base, 1.0), 0.0)
    log_total = tl.log(total)
    features = tl.where(column == LSE, (top + log_total)[:, None], features)
    features = tl.where(column == ENTROPY, (log_total - score_sum / total)[:, None], features)
    features = tl.where(column == MAX_PROB, (largest / total)[:, None], features)
    for group in range(GROUPS):
        share = tl.load(shares + group * HEADS + head, mask=head < HEADS, other=0.0)
        mean = tl.sum(share[:, None] * features, axis=0)
        feature = tl.arange(0, COLUMNS)
        at = out + slot.to(tl.int64) * out_slot + group * out_group + feature * out_feature
        tl.store(at, mean.to(out.dtype.element_ty), mask=feature < N_FEATURES)
