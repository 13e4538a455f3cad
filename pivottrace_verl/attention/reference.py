"""The row statistics in torch: a dense definition, and the paged form the CPU backend runs.

One row is the attention of one query at absolute position t over the keys s <= t of its request.
`dense_statistics` writes the definitions down as sums over a probability matrix (the oracle);
`row_statistics` reads keys through a block table, for a ragged batch of rows at once.

All distance statistics are sums of probability over a range of keys, so they are read off one
cumulative sum. It runs from the newest key to the oldest: what is left when the sink is taken out
is then summed on its own and keeps its relative accuracy however large the sink is.
`sum A min(t-s, W)` is the sum over w = 1..W of the mass at distance >= w.

A learnt sink (`ScoreRule.sinks`) takes part in the softmax and has no key: it counts towards `lse`,
`entropy` and `sink_mass`, and towards no position.

Axes: N rows, H query heads, S keys, D head size, F features in the order of `pivots.FEATURES`.
"""

from dataclasses import dataclass

import torch

from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.attention.keys import PagedKeys, StridedKeys
from pivottrace_verl.pivots import FEATURES

N_BUCKETS = 16
TINY = 1e-6
"""A share of attention at or below this is no denominator; the ratio is then 0."""
MASKED = -1e30
FLOOR = -80.0
"""Scores further than this below a row's largest, masked ones too, are raised to it: exp(-80) is
nothing beside 1, and exp is many times slower where it underflows."""
CHUNK_ELEMENTS = 1 << 25
"""Most key elements copied at once, so that long contexts do not double the memory."""
LOGITS_CHUNK = 1 << 20
"""Logits read at once: few enough that what is made of them stays in the cache."""


def dense_statistics(
    probabilities: torch.Tensor,
    lse: torch.Tensor,
    positions: torch.Tensor,
    prompt_length: int,
    config: CaptureConfig,
    learnt: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definitions, term by term, from softmax rows.

    Args:
        probabilities: [H, N, S] softmax rows; keys beyond a row's position hold 0.
        lse: [H, N] log-sum-exp of the scaled scores, a learnt sink's too.
        positions: [N] absolute position t of each query.
        prompt_length: P.
        learnt: [H, N] probability of a learnt sink; rows then sum to one minus it.
    Returns:
        [N, H, F] float64.
    """
    a = probabilities.double()
    t = positions.to(a.device, torch.long)[:, None]
    s = torch.arange(a.shape[-1], device=a.device)[None, :]
    distance, seen = t - s, s <= t
    clipped = distance.clamp(0, config.window).double()

    def mass(keys: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        chosen = (keys & seen).double()
        return torch.einsum("hns,ns->hn", a, chosen if weight is None else chosen * weight)

    def ratio(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        return torch.where(whole > TINY, part / whole.clamp_min(TINY), torch.zeros_like(part))

    no_sink, response, far = s >= config.sink, s >= prompt_length, distance >= config.window
    sink_mass, response_mass = mass(s < config.sink), mass(response)
    entropy = torch.special.entr(a).sum(-1)
    if learnt is not None:
        sink_mass = sink_mass + learnt.double()
        entropy = entropy + torch.special.entr(learnt.double())
    edges = [0, *(2**b for b in range(N_BUCKETS - 1)), 2**62]
    features = {
        "lse": lse.double(),
        "entropy": entropy,
        "max_prob": a.amax(-1),
        "sink_mass": sink_mass,
        "prompt_mass": mass(s < prompt_length),
        "long_mass": ratio(mass(no_sink & far), 1 - sink_mass),
        "distance": ratio(mass(no_sink, clipped), 1 - sink_mass),
        "response_long_mass": ratio(mass(response & far), response_mass),
        "response_distance": ratio(mass(response, clipped), response_mass),
    }
    for b in range(N_BUCKETS):
        features[f"bucket_{b}"] = mass((distance >= edges[b]) & (distance < edges[b + 1]))
    return torch.stack([features[name] for name in FEATURES], dim=-1).transpose(0, 1)


def group_heads(statistics: torch.Tensor, groups: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """Mean over each group's heads: [N, H, F] -> [N, len(groups), F]."""
    return torch.stack([statistics[:, list(group)].mean(1) for group in groups], dim=1)


def needed_heads(
    groups: tuple[tuple[int, ...], ...], n_heads: int
) -> tuple[torch.Tensor | None, tuple[tuple[int, ...], ...]]:
    """The heads that are in a group, None for all of them, and the groups by their places there."""
    needed = sorted({head for group in groups for head in group})
    if len(needed) == n_heads:
        return None, groups
    places = tuple(tuple(needed.index(head) for head in group) for group in groups)
    return torch.tensor(needed), places


@dataclass(frozen=True)
class ScoreRule:
    """How a layer turns products of queries and keys into softmax scores."""

    scale: float
    """Softmax scale: score = scale * <q, k>."""
    soft_cap: float = 0.0
    """c of c * tanh(score / c); 0: none."""
    sinks: torch.Tensor | None = None
    """[H] a learnt score of each head that joins the softmax without a key (gpt-oss)."""


@dataclass(frozen=True)
class RowPlan:
    """What the rows of one step share between layers: which keys, and where the sums are read.

    blocks [N, B] block numbers; mask [N, 1, B * block_size] 0, and MASKED for the keys a row does
    not see; reads [N, 1, 18 + W] indices into the cumulative sum from the newest key.
    """

    blocks: torch.Tensor
    mask: torch.Tensor
    reads: torch.Tensor

    def slice(self, rows: slice) -> "RowPlan":
        return RowPlan(self.blocks[rows], self.mask[rows], self.reads[rows])


def plan_rows(
    block_table: torch.Tensor,
    positions: torch.Tensor,
    prompt_lengths: torch.Tensor,
    block_size: int,
    config: CaptureConfig,
    sliding_window: int | None = None,
) -> RowPlan:
    """The plan of N rows.

    Args:
        block_table: [N, >= B] block numbers of each row's request.
        positions: [N] absolute position t of each query.
        prompt_lengths: [N] P of each row's request.
        sliding_window: keys a row sees, its own included; None: all up to its position.
    """
    t = positions.to(torch.long)[:, None]
    prompt = prompt_lengths.to(torch.long)[:, None]
    n_blocks = int(t.max()) // block_size + 1
    n_keys = n_blocks * block_size
    near = torch.tensor([1 << b for b in range(N_BUCKETS - 1)])
    within = torch.arange(1, config.window + 1)
    # First key of each range that is summed up to t; see `_features` for the order.
    first = torch.cat(
        [
            torch.zeros_like(t),
            (t + 1).clamp(max=config.sink),
            torch.minimum(prompt, t + 1),
            t + 1 - near,
            t + 1 - within,
        ],
        dim=1,
    ).clamp_(min=0)
    key = torch.arange(n_keys)
    unseen = key > t
    if sliding_window is not None:
        unseen |= key <= t - sliding_window
    return RowPlan(
        blocks=block_table[:, :n_blocks].to(torch.long),
        mask=(unseen * MASKED)[:, None],
        reads=(n_keys - first)[:, None],
    )


def row_statistics(
    query: torch.Tensor,
    keys: PagedKeys | StridedKeys,
    plan: RowPlan,
    rule: ScoreRule,
    heads: torch.Tensor | None = None,
) -> torch.Tensor:
    """Statistics of N rows over paged keys.

    Args:
        query: [N, H, D] after rotary embedding.
        keys: the layer's paged keys.
        plan: `plan_rows` of the same N rows.
        rule: the layer's.
        heads: [H'] the query heads that are wanted; None: all.
    Returns:
        [N, H', F] float32.
    """
    elements = plan.blocks.shape[1] * keys.block_elements
    chunk = max(1, CHUNK_ELEMENTS // elements)
    if query.shape[0] <= chunk:
        return _chunk_statistics(query, keys, plan, rule, heads)
    parts = []
    for start in range(0, query.shape[0], chunk):
        rows = slice(start, start + chunk)
        parts.append(_chunk_statistics(query[rows], keys, plan.slice(rows), rule, heads))
    return torch.cat(parts)


def _chunk_statistics(
    query: torch.Tensor,
    keys: PagedKeys | StridedKeys,
    plan: RowPlan,
    rule: ScoreRule,
    heads: torch.Tensor | None,
) -> torch.Tensor:
    n, n_heads, size = query.shape
    q = (query.float() * rule.scale).view(n, 1, keys.kv_heads, n_heads // keys.kv_heads, size)
    scores = torch.matmul(q, keys.take(plan.blocks))  # [N, B, H_kv, H / H_kv, block_size]
    scores = scores.permute(0, 2, 3, 1, 4)
    sinks = rule.sinks
    if heads is not None:
        sharing = n_heads // keys.kv_heads
        scores = scores[:, heads // sharing, heads % sharing]
        sinks = None if sinks is None else sinks[heads]
        n_heads = len(heads)
    scores = scores.reshape(n, n_heads, plan.mask.shape[-1])
    if rule.soft_cap:
        scores.div_(rule.soft_cap).tanh_().mul_(rule.soft_cap)
    scores += plan.mask
    top = scores.amax(-1, keepdim=True)
    # Nothing is exponentiated above 0, however large the learnt sink is.
    sink = None if sinks is None else sinks.float()[None, :, None].expand_as(top)
    shift = top if sink is None else torch.maximum(top, sink)
    scores.sub_(shift).clamp_min_(FLOOR)
    weights = scores.exp()
    score_sum = (weights * scores).sum(-1, keepdim=True)
    sums = weights.new_zeros(n, n_heads, weights.shape[-1] + 1)
    torch.cumsum(weights.flip(-1), -1, out=sums[..., 1:])
    read = sums.gather(-1, plan.reads.expand(n, n_heads, -1))
    largest, learnt = torch.ones_like(top), torch.zeros_like(top)
    if sink is not None:
        scores_of_sink = (sink - shift).clamp_min_(FLOOR)
        largest, learnt = (top - shift).exp(), scores_of_sink.exp()
        score_sum += learnt * scores_of_sink
    return _features(read, shift, score_sum, largest, learnt)


def _features(
    read: torch.Tensor,
    shift: torch.Tensor,
    score_sum: torch.Tensor,
    largest: torch.Tensor,
    learnt: torch.Tensor,
) -> torch.Tensor:
    """Features from sums of weights exp(score - shift) over key ranges that end at the query.

    `read` holds, in this order, the sum over all keys, over keys past the sink, over response
    keys, over keys nearer than 1, 2, 4, ... 2^14 tokens, and nearer than 1 .. W tokens. The others
    are [N, H, 1]: the sum of weight times (score - shift), the largest key's weight, the learnt
    sink's.
    """
    of_keys, past_sink, response = read[..., 0:1], read[..., 1:2], read[..., 2:3]
    near, within = read[..., 3 : 2 + N_BUCKETS], read[..., 2 + N_BUCKETS :]
    total = of_keys + learnt
    log_total = total.log()
    out = [
        shift + log_total,
        log_total - score_sum / total,
        largest / total,
        (total - past_sink) / total,
        (of_keys - response) / total,
    ]
    for base in (past_sink, response):
        beyond = (base - within).clamp_min_(0)  # mass at distance >= w, for w = 1 .. W
        enough = base / total > TINY
        part = torch.cat([beyond[..., -1:], beyond.sum(-1, keepdim=True)], -1) / base
        out.append(torch.where(enough, part, torch.zeros_like(part)))
    out.append(
        torch.diff(
            torch.cat([near, of_keys], -1),
            dim=-1,
            prepend=near.new_zeros(()).expand(*near.shape[:-1], 1),
        )
        / total
    )
    return torch.cat(out, -1)


def token_statistics(logits: torch.Tensor) -> torch.Tensor:
    """Statistics in nats of p = softmax(logits) at temperature 1, over the full vocabulary:
    [N, V] -> [N, K] float32, in the order of `TOKEN_STATISTICS`.

    Entropy is -sum p log p. Self-certainty (arXiv 2502.18581) is KL(uniform || p)
    = -1/V sum log(V p), taken over the words that are not masked.
    """
    chunk = max(1, LOGITS_CHUNK // logits.shape[-1])
    out = []
    for part in logits.split(chunk):
        # Masked vocabulary is -inf; the floor keeps 0 * -inf out of the sum.
        top = part.amax(-1, keepdim=True).float()
        score = part.float() - top
        n_words = score.new_full((len(score),), score.shape[-1])
        score_sum = score.sum(-1)
        if bool(score_sum.isinf().any()):
            masked = score == -torch.inf
            n_words -= masked.sum(-1)
            score_sum = score.masked_fill(masked, 0.0).sum(-1)
        score.clamp_min_(FLOOR)
        weight = score.exp()
        total = weight.sum(-1)
        log_total = total.log()
        entropy = log_total - torch.linalg.vecdot(weight, score) / total
        certainty = log_total - n_words.log() - score_sum / n_words
        out.append(torch.stack([entropy, certainty], dim=-1))
    return torch.cat(out)
