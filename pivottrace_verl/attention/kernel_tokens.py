# mypy: disable-error-code="no-untyped-def"
"""The device code of `kernel.write_tokens`: entropy and self-certainty of the next-token logits.

One pass over a row's logits with an online softmax; one program a row, nothing in between. The two
statistics are stored in the order of `config.TOKEN_STATISTICS`.
"""

import triton
import triton.language as tl

from pivottrace_verl.attention.config import TOKEN_STATISTICS

ENTROPY = tl.constexpr(TOKEN_STATISTICS.index("token_entropy"))
CERTAINTY = tl.constexpr(TOKEN_STATISTICS.index("self_certainty"))


@triton.jit
def choices(
    logits, slots, owners, tokens, owner, logits_row, logits_word, n_words, tokens_slot,
    TILE: tl.constexpr,
):  # fmt: skip
    """Row `program_id(0)` of the logits; nothing where its slot is -1."""
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    if slot < 0:
        return
    at = logits + row.to(tl.int64) * logits_row
    top = -float("inf")
    total, score_sum = 0.0, 0.0
    # Kept by lane, so that no sum has more than n_words / TILE terms before it is reduced.
    plain, count = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    for begin in range(0, n_words, TILE):
        word = begin + tl.arange(0, TILE)
        inside = word < n_words
        score = tl.load(at + word * logits_word, mask=inside, other=-float("inf")).to(tl.float32)
        there = score > -float("inf")
        new_top = tl.maximum(top, tl.max(score, axis=0))
        # Until a word that is not masked was met, all sums are 0.
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        step = tl.where(top == -float("inf"), 0.0, top - base)
        factor = tl.exp(step)
        below = tl.where(there, score - base, 0.0)
        weight = tl.where(there, tl.exp(below), 0.0)
        score_sum = factor * (score_sum + step * total) + tl.sum(weight * below, axis=0)
        total = factor * total + tl.sum(weight, axis=0)
        plain += tl.where(there, score, 0.0)
        count += there.to(tl.float32)
        top = new_top
    words = tl.sum(count, axis=0)
    log_total = tl.log(total)
    certainty = log_total - tl.log(words) - (tl.sum(plain, axis=0) / words - top)
    tl.store(tokens + slot * tokens_slot + ENTROPY, log_total - score_sum / total)
    tl.store(tokens + slot * tokens_slot + CERTAINTY, certainty)
    tl.store(owner + slot, tl.load(owners + row))
