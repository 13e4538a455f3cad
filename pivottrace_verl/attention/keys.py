"""The keys as they lie in vLLM's KV cache.

`StridedKeys` reads keys that are a view of the cache, as in vLLM's GPU backends; `PagedKeys` those
of its CPU backend. There the cache of a layer is [blocks, H_kv, block_size, 2 D]. The first half of
each (block, head) holds the keys, the second the values, each in an order that suits the
instruction set vLLM chose:

- `columns` ("vec" and its kin): one column a token, [D, block_size]
  (csrc/cpu/cpu_attn_vec.hpp, reshape_and_cache);
- `amx`: tiles of 16 tokens whose elements lie in pairs, [block_size / 16, D / 2, 16, 2]
  (csrc/cpu/cpu_attn_amx.hpp).

Which one it is, is found by writing known keys the way the engine does and reading them back: a
view that read something else would give numbers that look like statistics.

Axes: N rows, B blocks of a row, H_kv key heads, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

TILE = 16
LAYOUTS = ("columns", "amx")


@dataclass(frozen=True)
class StridedKeys:
    """One layer's keys in place, in any order of memory."""

    view: torch.Tensor
    """[blocks, block_size, H_kv, D], any strides: `cache[:, 0]` of [blocks, 2, ...] or
    `cache[..., :D].transpose(1, 2)` of [blocks, H_kv, block_size, 2 D], say."""
    scale: torch.Tensor | None = None
    """[1] float32, what FP8 keys are multiplied by."""

    @property
    def block_elements(self) -> int:
        """Numbers of all heads' keys in one block."""
        return int(self.view[0].numel())

    @property
    def kv_heads(self) -> int:
        return int(self.view.shape[2])

    def as_written(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys of any shape as they are read back once vLLM wrote them here: rounded."""
        dtype = self.view.dtype
        if self.scale is None:
            return keys.to(dtype)
        most = torch.finfo(dtype).max  # vLLM's kernels saturate
        return (keys.float() / self.scale).clamp(-most, most).to(dtype).float() * self.scale

    def take(self, blocks: torch.Tensor) -> torch.Tensor:
        """Keys of blocks [N, B] as float32 [N, B, H_kv, D, block_size]."""
        keys = self.view[blocks].permute(0, 1, 3, 4, 2).float()
        return keys if self.scale is None else keys * self.scale


@dataclass(frozen=True)
class PagedKeys:
    """One layer's keys in place, in the CPU backend's cache."""

    cache: torch.Tensor
    """[blocks, H_kv, block_size, 2 D], contiguous."""
    layout: str

    @property
    def block_elements(self) -> int:
        """Numbers of all heads' keys in one block."""
        return int(self.cache[0].numel()) // 2

    @property
    def kv_heads(self) -> int:
        return int(self.cache.shape[1])

    def take(self, blocks: torch.Tensor) -> torch.Tensor:
        """Keys of blocks [N, B] as float32 [N, B, H_kv, D, block_size]."""
        n_blocks, kv_heads, block_size, double = self.cache.shape
        size = double // 2
        # One copy of whole (block, head) rows of one matrix: the fastest gather on a CPU.
        rows = self.cache.as_strided(
            (n_blocks * kv_heads, size * block_size), (block_size * double, 1)
        )
        wanted = blocks[..., None] * kv_heads + torch.arange(kv_heads)
        found = rows.index_select(0, wanted.flatten())
        if self.layout == "columns":
            return found.view(*wanted.shape, size, block_size).float()
        tiles = found.view(*wanted.shape, block_size // TILE, size // 2, TILE, 2)
        keys = torch.empty(*wanted.shape, size // 2, 2, block_size // TILE, TILE)
        keys.copy_(tiles.permute(0, 1, 2, 4, 6, 3, 5))
        return keys.view(*wanted.shape, size, block_size)


def find_layout(
    cache: torch.Tensor, write: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]
) -> str | None:
    """The layout in which `write(keys, values, slots)` leaves keys in `cache`; None if unknown.

    Runs before the first request; the cache is left as it was.
    """
    n_blocks, kv_heads, block_size, double = cache.shape
    if not cache.is_contiguous():
        return None
    slots = torch.tensor([1, block_size - 1, (n_blocks - 1) * block_size + block_size // 2])
    touched = torch.unique(slots // block_size)
    before = cache[touched].clone()
    generator = torch.Generator().manual_seed(0)
    shape = (len(slots), kv_heads, double // 2)
    keys, values = (torch.randn(shape, generator=generator).to(cache.dtype) for _ in range(2))
    write(keys, values, slots)
    fitting = [layout for layout in LAYOUTS if _reads(PagedKeys(cache, layout), slots, keys)]
    cache[touched] = before
    return fitting[0] if fitting else None


def _reads(paged: PagedKeys, slots: torch.Tensor, keys: torch.Tensor) -> bool:
    """True when the keys [N, H_kv, D] are found at their slots."""
    block_size, double = paged.cache.shape[2:]
    if paged.layout == "amx" and (block_size % TILE or double % 4):
        return False
    blocks = paged.take((slots // block_size)[:, None])[:, 0]
    found = blocks[torch.arange(len(slots)), :, :, slots % block_size]
    return bool(torch.equal(found, keys.float()))
