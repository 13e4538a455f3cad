"""The row statistics as one compiled call a layer, for vLLM's CPU backend.

The mathematics is that of `reference.row_statistics`, which is some forty torch operations: in a
decode step each is short and finds the processor's caches full of weights, so that calling them
costs more than what they do. Here one loop over rows and heads reads the keys where they lie and
writes features where they are kept. numba, which vLLM requires on these processors itself, compiles
it when the first engine starts and keeps the result on disk.

Numbers are float32, or bfloat16 as its 16 bits (uint16), which are widened as they are read.
Loops over rows run on several threads and without the interpreter's lock.

Axes: N rows of a step, H query heads, H_kv key heads, D head size, B blocks of a row, G head
groups, F features in the order of `pivots.FEATURES`, V vocabulary.
"""

# numba reads the types off the arguments.
# mypy: disable-error-code="no-untyped-def, assignment"

from functools import cache
from typing import Any

import numpy as np
from numba import config, njit, prange, types
from numba.extending import overload

from pivottrace_verl.attention.reference import FLOOR, N_BUCKETS, TINY
from pivottrace_verl.pivots import FEATURES

F32 = np.float32
LOG2_E = F32(1.4426950408889634)
LEAST = F32(FLOOR)
SMALL = F32(TINY)
N_FEATURES = len(FEATURES)
BUCKET_0 = FEATURES.index("bucket_0")
TILE = 16
LANES = 64
# Of numba's threads those of OpenMP are torch's own.
config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]
LOGITS_CHUNK = 2048
"""Logits read twice in a row: few enough that they stay in the nearest cache, and that float32 sums
of them keep their accuracy."""
FAST = {"reassoc", "contract", "nsz", "arcp"}
"""Sums may be reordered, so that they are vectorised; infinities keep their meaning."""


def _widen(number: Any) -> Any:
    """A number as float32."""


@overload(_widen, strict=False)
def _widen_overload(number: Any) -> Any:
    if number == types.uint16:
        return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)
    return lambda number: number


@njit(inline="always")
def _exp(x):
    """exp of x in FLOOR to 0, within 3e-7 of its value at 0 and of 1 elsewhere."""
    power = x * LOG2_E
    whole = np.floor(power + F32(0.5))
    part = power - whole  # 2 ** part for a part in -0.5 to 0.5, by its Taylor series
    value = F32(1.5403530e-4)
    value = value * part + F32(1.3333558e-3)
    value = value * part + F32(9.6181291e-3)
    value = value * part + F32(5.5504109e-2)
    value = value * part + F32(2.4022651e-1)
    value = value * part + F32(6.9314718e-1)
    value = value * part + F32(1.0)
    return value * np.int32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(inline="always")
def _sum(weights, first, end):
    total = F32(0)
    for j in range(first, end):
        total += weights[j]
    return total


@njit(fastmath=FAST)
def _largest(numbers, lanes):
    """The largest of some numbers, of many at a time in the scratch `lanes` [LANES] float32."""
    for lane in range(LANES):
        lanes[lane] = -np.inf
    n = len(numbers)
    for start in range(0, n - LANES + 1, LANES):
        part = numbers[start : start + LANES]
        for lane in range(LANES):
            number = _widen(part[lane])
            lanes[lane] = number if number > lanes[lane] else lanes[lane]
    for j in range(n - n % LANES, n):
        lanes[0] = max(lanes[0], _widen(numbers[j]))
    largest = lanes[0]
    for lane in range(LANES):
        largest = max(largest, lanes[lane])
    return largest


@njit(fastmath=FAST)
def _products(query, keys, first, scores, n, size):
    """scores [n] = query [D] times keys[first:] [D * n], one column a token; D a multiple of 8, so
    that a score is read and written once for eight products."""
    for j in range(n):
        scores[j] = F32(0)
    for d in range(0, size, 8):
        q0, q1, q2, q3 = query[d], query[d + 1], query[d + 2], query[d + 3]
        q4, q5, q6, q7 = query[d + 4], query[d + 5], query[d + 6], query[d + 7]
        # One slice, not eight: each would be checked for overlap with the scores.
        k = keys[first + d * n : first + (d + 8) * n]
        for j in range(n):
            near = q0 * k[j] + q1 * k[n + j] + q2 * k[2 * n + j] + q3 * k[3 * n + j]
            far = q4 * k[4 * n + j] + q5 * k[5 * n + j] + q6 * k[6 * n + j] + q7 * k[7 * n + j]
            scores[j] += near + far


@njit
def _rearrange(pages, first, held, block_size, size, amx):
    """held [D * block_size]: the keys at pages[first:] as float32, one column a token; see `keys`
    for the layouts."""
    page = pages[first : first + block_size * size]
    if amx:
        for tile in range(block_size // TILE):
            for pair in range(size // 2):
                at = tile * TILE * size + pair * 2 * TILE
                to = 2 * pair * block_size + tile * TILE
                for j in range(TILE):
                    held[to + j] = _widen(page[at + 2 * j])
                    held[to + block_size + j] = _widen(page[at + 2 * j + 1])
    else:
        for i in range(block_size * size):
            held[i] = _widen(page[i])


def _columns(pages: Any, held: Any, in_place: bool) -> Any:
    """Which of the two holds a block's keys as `_products` reads them."""


@overload(_columns, strict=False)
def _columns_overload(pages, held, in_place):
    if pages.dtype == types.float32:
        return lambda pages, held, in_place: pages if in_place else held
    return lambda pages, held, in_place: held


@njit(fastmath=FAST)
def _features(scores, first, position, prompt, window, sink, learnt, lanes, out):
    """Features of one row and head: see `reference.dense_statistics`.

    scores holds those of the keys first .. position and is overwritten; learnt is the score of a
    learnt sink, -inf for none.
    """
    n = len(scores)
    top = _largest(scores, lanes)
    shift = max(top, learnt)
    score_sum = F32(0)
    for j in range(n):
        score = max(scores[j] - shift, LEAST)
        weight = _exp(score)
        score_sum += weight * score
        scores[j] = weight
    of_keys, end = F32(0), n
    for b in range(N_BUCKETS):
        begin = max(0, n - (1 << b)) if b < N_BUCKETS - 1 else 0
        mass = _sum(scores, begin, end)
        out[BUCKET_0 + b] = mass
        of_keys += mass
        end = begin
    score = max(learnt - shift, LEAST)
    of_sink = _exp(score) if learnt > -np.inf else F32(0)
    total = of_keys + of_sink
    score_sum += of_sink * score
    past_sink = max(0, min(n, sink - first))
    response = max(0, min(n, prompt - first))
    log_total = np.log(total)
    out[0] = shift + log_total
    out[1] = log_total - score_sum / total
    out[2] = np.exp(top - shift) / total
    out[3] = (_sum(scores, 0, past_sink) + of_sink) / total
    out[4] = _sum(scores, 0, response) / total
    near = max(0, n - window)  # the first key nearer than the window
    place = 5
    for start in (past_sink, response):
        from_near = max(start, near)
        far, close, clipped = _sum(scores, start, near), F32(0), F32(0)
        for j in range(from_near, n):
            close += scores[j]
            clipped += scores[j] * F32(n - 1 - j)
        whole = far + close
        enough = whole > SMALL * total
        out[place] = far / whole if enough else F32(0)
        out[place + 1] = (clipped + F32(window) * far) / whole if enough else F32(0)
        place += 2
    for b in range(N_BUCKETS):
        out[BUCKET_0 + b] /= total


@njit(inline="always")
def _block_scores(queries, wanted, numbers, start, held, amx, scores, at, block_size, size):
    """scores[:, at:] [sharing, block_size] of the wanted heads with the keys at numbers[start:]."""
    in_place = not amx and numbers.itemsize == held.itemsize
    if not in_place:
        _rearrange(numbers, start, held, block_size, size, amx)
        start = 0
    keys = _columns(numbers, held, in_place)
    for g in range(len(queries)):
        if wanted[g]:
            own = scores[g, at : at + block_size]  # contiguous, and known to be
            _products(queries[g], keys, start, own, block_size, size)


@njit
def _add_features(
    scores, before, first, position, prompt, weights, soft_cap, sinks, window, sink, lanes,
    features, out,
):  # fmt: skip
    """Features of a row and the heads of a key head, times their weights [G, sharing], into
    out [G, F]; scores [sharing, keys from position `before` on] are overwritten."""
    for g in range(len(scores)):
        if not np.any(weights[:, g]):
            continue
        used = scores[g, first - before : position + 1 - before]
        if soft_cap > 0:
            for j in range(len(used)):
                used[j] = soft_cap * np.tanh(used[j] / soft_cap)
        _features(used, first, position, prompt, window, sink, sinks[g], lanes, features)
        for group in range(len(weights)):
            weight = weights[group, g]
            if weight > 0:
                for i in range(N_FEATURES):
                    out[group, i] += weight * features[i]


@cache
def layer_rows(block_size: int, size: int) -> Any:
    """The compiled function for these blocks and heads: its inner loops are only fast when their
    lengths are known. It writes the rows of one layer into stats[slots, layer] of its last
    arguments, stats [slots of the engine, L, G, F] float32 and slots [N].

    The others: query [N, H, D] after rotary embedding; pages [blocks, H_kv, 2 D block_size],
    keys first, in the layout `columns` or `amx`; table [N, >= B]; positions, prompts [N];
    weights [G, H] of each head in its groups' means; sinks [H] learnt scores, -inf for none;
    seen, how many keys a row sees, its own included.
    """

    # fmt: off
    @njit(nogil=True)
    def key_head(
        query, numbers, start, stride, amx, blocks, position, prompt, weights, scale, soft_cap,
        sinks, seen, window, sink, out,
    ):
        # fmt: on
        sharing = len(query)
        first = max(0, position + 1 - seen)
        first_block, end_block = first // block_size, position // block_size + 1
        wanted = np.zeros(sharing, np.bool_)
        queries = np.empty((sharing, size), np.float32)
        for g in range(sharing):
            wanted[g] = np.any(weights[:, g])
            for d in range(size):
                queries[g, d] = _widen(query[g, d]) * scale
        held = np.empty(size * block_size, np.float32)
        scores = np.empty((sharing, (end_block - first_block) * block_size), np.float32)
        for block in range(first_block, end_block):
            _block_scores(
                queries, wanted, numbers, start + blocks[block] * stride, held, amx, scores,
                (block - first_block) * block_size, block_size, size,
            )  # fmt: skip
        _add_features(
            scores, first_block * block_size, first, position, prompt, weights, soft_cap, sinks,
            window, sink, np.empty(LANES, np.float32), np.empty(N_FEATURES, np.float32), out,
        )  # fmt: skip

    # fmt: off
    @njit(nogil=True, cache=True, parallel=True)
    def rows(
        query, pages, amx, table, positions, prompts, weights, scale, soft_cap, sinks, seen,
        window, sink, stats, slots, layer,
    ):
        # fmt: on
        kv_heads, length = pages.shape[1], pages.shape[2]
        sharing = query.shape[1] // kv_heads
        numbers = pages.reshape(-1)
        # Of each key head its part in the groups' means.
        parts = np.zeros((len(positions), kv_heads, len(weights), N_FEATURES), np.float32)
        for item in prange(len(positions) * kv_heads):
            row, kv_head = item // kv_heads, item % kv_heads
            heads = slice(kv_head * sharing, (kv_head + 1) * sharing)
            if np.any(weights[:, heads]):
                key_head(
                    query[row, heads], numbers, kv_head * length, kv_heads * length, amx,
                    table[row], positions[row], prompts[row], weights[:, heads], scale, soft_cap,
                    sinks[heads], seen, window, sink, parts[row, kv_head],
                )  # fmt: skip
        for row in range(len(positions)):
            for group in range(len(weights)):
                for i in range(N_FEATURES):
                    mean = F32(0)
                    for kv_head in range(kv_heads):
                        mean += parts[row, kv_head, group, i]
                    stats[slots[row], layer, group, i] = mean

    return rows


@njit(fastmath=FAST, nogil=True)
def _token_row(row, out):
    """Entropy and self-certainty of the logits of one row [V]: out [2]."""
    lanes = np.empty(LANES, np.float32)
    top, total, weighted, score_sum, n_words = -np.inf, 0.0, 0.0, 0.0, 0
    for start in range(0, len(row), LOGITS_CHUNK):
        part = row[start : start + LOGITS_CHUNK]
        largest = _largest(part, lanes)
        if largest == -np.inf:
            continue  # all masked
        if largest > top:
            # What was summed so far was relative to a smaller maximum.
            if n_words:
                rise = top - largest
                shrink = np.exp(rise)
                weighted = shrink * (weighted + rise * total)
                total *= shrink
                score_sum += rise * n_words
            top = np.float64(largest)
        shift = F32(top)
        part_total, part_weighted, part_sum = F32(0), F32(0), F32(0)
        for j in range(len(part)):
            score = _widen(part[j]) - shift
            part_sum += score
            score = max(score, LEAST)
            weight = _exp(score)
            part_total += weight
            part_weighted += weight * score
        part_words = len(part)
        if part_sum == -np.inf:  # some are masked
            part_sum = F32(0)
            for j in range(len(part)):
                score = _widen(part[j]) - shift
                if score == -np.inf:
                    part_words -= 1
                else:
                    part_sum += score
        total += part_total
        weighted += part_weighted
        score_sum += part_sum
        n_words += part_words
    log_total = np.log(total)
    out[0] = log_total - weighted / total
    out[1] = log_total - np.log(n_words) - score_sum / n_words


@njit(nogil=True, cache=True, parallel=True)
def token_rows(logits, rows, out, slots):
    """Entropy and self-certainty of logits[rows] [N, V] as in `reference.token_statistics`, into
    out[slots] [slots of the engine, 2]."""
    for i in prange(len(rows)):
        _token_row(logits[rows[i]], out[slots[i]])
