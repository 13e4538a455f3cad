"""The kernels against the torch reference on one device; prints one line of JSON.

    python recipes/gpu_check/kernel.py cuda|cpu quick|full

On a GPU they are compiled. With `cpu` and TRITON_INTERPRET=1 the same cases run in Triton's
interpreter, which proves this script and not the GPU.
"""

import itertools
import json
import sys
from typing import Any

import torch

from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.attention.device_layers import device_reads_fp8
from pivottrace_verl.attention.kernel import Batch, RowKernel, group_shares, write_tokens
from pivottrace_verl.attention.keys import StridedKeys
from pivottrace_verl.attention.reference import (
    ScoreRule,
    group_heads,
    plan_rows,
    row_statistics,
    token_statistics,
)
from pivottrace_verl.pivots import FEATURES

BLOCK = 16
BOUND = 1e-4
SHAPES = {  # query heads, KV heads, head size
    "qwen2.5-7b": (28, 4, 128),
    "smollm2": (9, 3, 64),
    "gemma": (8, 4, 256),
}
LENGTHS = (1, 5, 64, 300, 4097)
DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn")


def case(
    shape: tuple[int, int, int], dtype: str, joined: bool, window: int | None, device: str,
    lengths: tuple[int, ...],
) -> float:  # fmt: skip
    """The largest difference of one decode batch, distances in units of their window."""
    heads, kv_heads, size = shape
    config, rule = CaptureConfig(), ScoreRule(size**-0.5)
    g = torch.Generator().manual_seed(0)
    per = [-(-length // BLOCK) for length in lengths]
    order = torch.randperm(sum(per), generator=g).to(torch.int32)
    table = torch.zeros(len(lengths) + 1, max(per), dtype=torch.int32)
    for r, (n, blocks) in enumerate(zip(per, order.split(per), strict=True)):
        table[r, :n] = blocks
    place = torch.tensor([length - 1 for length in lengths])
    slots = table[torch.arange(len(lengths)), place // BLOCK].long() * BLOCK + place % BLOCK
    prompts = torch.tensor([max(1, n // 3) for n in lengths] + [-1], dtype=torch.int32)
    # One padding request and one padding token.
    batch = Batch(
        starts=torch.tensor([*range(len(lengths) + 1), len(lengths)], dtype=torch.int32),
        lengths=torch.tensor([*lengths, 0], dtype=torch.int32),
        table=table,
        slots=torch.cat([slots, torch.tensor([-1])]),
        prompts=prompts,
        responses=prompts,
    )
    query = torch.randn(len(lengths) + 1, heads, size, generator=g)
    of_keys = getattr(torch, dtype)
    query = query.to(torch.bfloat16 if dtype.startswith("float8") else of_keys)
    if joined:
        cache = torch.randn(sum(per), kv_heads, BLOCK, 2 * size, generator=g).to(of_keys)
        view = cache[..., :size].transpose(1, 2)
    else:
        cache = torch.randn(sum(per), 2, BLOCK, kv_heads, size, generator=g).to(of_keys)
        view = cache[:, 0]
    scale = torch.tensor(0.5) if dtype.startswith("float8") else None
    groups = (tuple(range(heads)),)
    plan = plan_rows(table[:-1], place, prompts[:-1], BLOCK, config, window)
    rows = row_statistics(query[:-1], StridedKeys(view, scale), plan, rule)
    wanted = group_heads(rows, groups)

    there = Batch(**{name: value.to(device) for name, value in vars(batch).items()})
    store = torch.full((sum(per) * BLOCK, 1, len(FEATURES)), -7.0, device=device)
    where = view.to(device) if device == "cpu" else _same_strides(view, device)
    keys = StridedKeys(where, None if scale is None else scale.to(device))
    kernel = RowKernel(config, heads, len(lengths) + 1, device)
    shares = group_shares(groups, heads).to(device)
    kernel(query.to(device), keys, rule, there, shares, store, window)
    found = store.cpu()
    untouched = torch.ones(len(found), dtype=torch.bool)
    untouched[slots] = False
    assert bool((found[untouched] == -7.0).all()), "a row was written where none belongs"
    error = (found[slots] - wanted).abs()
    for i, name in enumerate(FEATURES):
        if name.endswith("distance"):
            error[..., i] /= config.window
    return float(error.max())


def _same_strides(view: torch.Tensor, device: str) -> torch.Tensor:
    """A copy on another device that lies in memory as the view does."""
    length = sum((n - 1) * step for n, step in zip(view.shape, view.stride(), strict=True)) + 1
    copy = torch.zeros(length, dtype=view.dtype, device=device)
    out = copy.as_strided(view.shape, view.stride())
    out.view(torch.uint8).copy_(view.contiguous().view(torch.uint8).to(device))
    return out


def tokens_case(dtype: str, n_words: int, device: str) -> float:
    """The largest difference of the statistics of next-token logits."""
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(5, n_words, generator=g) * 5).to(getattr(torch, dtype))
    logits[:, 3::7] = -torch.inf
    wanted = token_statistics(logits.float())
    stored = torch.zeros(9, 2, device=device)
    owner = torch.zeros(9, dtype=torch.int32, device=device)
    slots = torch.tensor([4, 1, 7, -1, 0], dtype=torch.int32)
    write_tokens(logits.to(device), slots.to(device), slots.to(device), stored, owner)
    asked = slots >= 0
    return float((stored.cpu()[slots[asked].long()] - wanted[asked]).abs().max())


def main(device: str, quick: bool) -> dict[str, Any]:
    lengths = LENGTHS[1:3] if quick else LENGTHS
    left_out = ["float16"] if quick else []
    if device == "cuda" and not device_reads_fp8():
        left_out.append("float8_e4m3fn")
    dtypes = [dtype for dtype in DTYPES if dtype not in left_out]
    shapes = {"smollm2": SHAPES["smollm2"]} if quick else SHAPES
    found = {
        f"{name} {dtype} {'0.28' if joined else '0.24'} window {window}": case(
            shape, dtype, joined, window, device, lengths
        )
        for (name, shape), dtype, joined, window in itertools.product(
            shapes.items(), dtypes, (False, True), (None, 100)
        )
    }
    words = (1000,) if quick else (49152, 151936)
    found |= {
        f"logits {dtype} {n}": tokens_case(dtype, n, device)
        for dtype, n in itertools.product(("float32", "bfloat16"), words)
    }
    told = {"bound": BOUND, "left_out": left_out, "max_abs_error": found}
    return told | {"ok": max(found.values()) <= BOUND}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2] == "quick")))
