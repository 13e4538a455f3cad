"""Rows of a step on the CPU: what the traced layers share, and the way into `cpu_kernel`.

`compiled_rows` gives None where nothing can be compiled (the model is float16, numba is missing or
has no folder to keep its work in); the rows then come from `reference.row_statistics`.

Axes: N rows of a step, T logits of a step, V vocabulary, B blocks of a row, H query heads, D head
size, G head groups, F features.
"""

import ctypes
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pivottrace_verl.attention.config import TOKEN_STATISTICS, WITHOUT_CAPTURE, CaptureConfig
from pivottrace_verl.attention.keys import PagedKeys
from pivottrace_verl.attention.reference import (
    RowPlan,
    ScoreRule,
    plan_rows,
    row_statistics,
)
from pivottrace_verl.pivots import FEATURES

logger = logging.getLogger(__name__)

COMPILED = (torch.float32, torch.bfloat16)
NO_WINDOW = 1 << 62
MANY_PRODUCTS = 1 << 20
MANY_LOGITS = 1 << 18
"""Some tenths of a millisecond on one thread. Less is not worth waiting for others, which on a busy
machine may not run for milliseconds."""
PROVED = 0.01
"""Distances reach 1024; what is compiled wrongly is off by far more."""


class StepRows:
    """The rows of one step, before any layer: block table [N, >= B] int32, absolute positions [N]
    and response starts [N] int64, the position of each rollout's first generated token."""

    def __init__(
        self,
        table: np.ndarray,
        positions: Sequence[int],
        starts: np.ndarray,
        block_size: int,
        config: CaptureConfig,
    ) -> None:
        self.starts = starts
        self.arrays = np.ascontiguousarray(table), np.array(positions, np.int64), starts
        """What `layer_rows` takes of a step."""
        self.n_keys = sum(positions) + len(positions)
        """How many keys the rows see, without a sliding window."""
        self._block_size = block_size
        self._config = config
        self._plans: dict[int | None, RowPlan] = {}

    def plan(self, sliding_window: int | None) -> RowPlan:
        """For `row_statistics`; made once for the layers that see equally far."""
        if sliding_window not in self._plans:
            table, positions, starts = map(torch.from_numpy, self.arrays)
            self._plans[sliding_window] = plan_rows(
                table, positions, starts, self._block_size, self._config, sliding_window
            )
        return self._plans[sliding_window]


@dataclass(frozen=True)
class LayerRows:
    """What makes the rows of one traced layer."""

    layout: str
    """Of its keys, see `keys`."""
    rule: ScoreRule
    sliding_window: int | None
    """Keys a row sees, its own included; None: all up to its position."""
    groups: tuple[tuple[int, ...], ...]
    """Query heads that are averaged."""
    n_heads: int


class CompiledRows:
    """`cpu_kernel` for the traced layers of one engine."""

    def __init__(self, kernel: Any, layers: Sequence[LayerRows], config: CaptureConfig) -> None:
        self._kernel = kernel
        self.layers = layers
        self._constants = [
            (_weights(layer), np.float32(layer.rule.scale), np.float32(layer.rule.soft_cap),
             _sinks(layer), layer.sliding_window or NO_WINDOW, config.window, config.sink)
            for layer in layers
        ]  # fmt: skip
        self._config = config
        self._threads = _Threads()
        self._held: list[tuple[int, np.ndarray] | None] = [None] * len(layers)

    def prove(self, place: int, cache: torch.Tensor) -> None:
        """Compile for keys like those of `cache`, and compare with the reference on random ones.

        Raises RuntimeError where the two differ.
        """
        layer = self.layers[place]
        generator = torch.Generator().manual_seed(0)
        block_size = cache.shape[2]
        pages = torch.randn(3, *cache.shape[1:], generator=generator).to(cache.dtype)
        shape = (2, layer.n_heads, cache.shape[3] // 2)
        query = torch.randn(shape, generator=generator).to(cache.dtype)
        table = np.array([[2, 1], [1, 0]], np.int32)
        positions = [block_size + 5, block_size - 2]
        step = StepRows(table, positions, np.array(positions) - 3, block_size, self._config)
        slots = torch.tensor([3, 1])
        stats = torch.zeros(4, len(self.layers), len(layer.groups), len(FEATURES))
        self.write_rows(place, query, pages, step, stats, slots)
        found = stats[slots, place]
        keys, plan = PagedKeys(pages, layer.layout), step.plan(layer.sliding_window)
        rows = row_statistics(query, keys, plan, layer.rule)
        weights = torch.from_numpy(self._constants[place][0])
        error = float((found - torch.einsum("gh,nhf->ngf", weights, rows)).abs().max())
        if not error <= PROVED:
            raise RuntimeError(
                f"Attention capture computed wrong rows at start (off by {error:.2g}): what numba "
                f"compiled for this processor cannot be used; {WITHOUT_CAPTURE}."
            )

    def write_rows(
        self,
        place: int,
        query: torch.Tensor,
        cache: torch.Tensor,
        step: StepRows,
        stats: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        """Rows [N, G, F] of one traced layer, into stats[slots, place].

        Args:
            place: of the layer among the traced ones.
            query: [N, H, D] after rotary embedding.
            cache: the layer's keys and values as in `keys.PagedKeys`.
            stats: [slots of the engine, L, G, F] float32.
            slots: [N] int64.
        """
        layer_rows = self._kernel.layer_rows(cache.shape[2], query.shape[2])
        self._threads.run(
            step.n_keys * query.shape[1] * query.shape[2] >= MANY_PRODUCTS,
            layer_rows, _numbers(query), self._pages(place, cache),
            self.layers[place].layout == "amx", *step.arrays, *self._constants[place],
            stats.numpy(), slots.numpy(), place,
        )  # fmt: skip

    def _pages(self, place: int, cache: torch.Tensor) -> np.ndarray:
        """The layer's keys and values where they lie, as [blocks, H_kv, 2 D block_size]."""
        held = self._held[place]
        if held is None or held[0] != cache.data_ptr():
            if not cache.is_contiguous():
                raise RuntimeError("a layer's keys and values are not contiguous")
            pages = _numbers(cache.view(*cache.shape[:2], -1))
            held = self._held[place] = cache.data_ptr(), pages
        return held[1]

    def write_tokens(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor | None,
        tokens: torch.Tensor,
        slots: torch.Tensor,
    ) -> None:
        """Token statistics of the rows [N] among logits [T, V], None: of all, into tokens[slots]
        [slots of the engine, K] float32."""
        index = np.arange(len(logits)) if rows is None else rows.numpy()
        self._threads.run(
            len(index) * logits.shape[1] >= MANY_LOGITS,
            self._kernel.token_rows, _numbers(logits), index, tokens.numpy(), slots.numpy(),
        )  # fmt: skip


def compiled_rows(
    caches: Sequence[torch.Tensor], layers: Sequence[LayerRows], config: CaptureConfig
) -> CompiledRows | None:
    """The compiled rows of an engine with the traced layers' `caches`, proved to be right."""
    if not caches or any(cache.dtype not in COMPILED for cache in caches):
        return None
    try:
        from pivottrace_verl.attention import cpu_kernel
    except (ImportError, RuntimeError) as error:
        logger.warning("PivotTrace captures without compiled code, more slowly: %s", error)
        return None
    compiled = CompiledRows(cpu_kernel, layers, config)
    for place, cache in enumerate(caches):
        compiled.prove(place, cache)
    logits, tokens = torch.zeros(1, 1, dtype=caches[0].dtype), torch.zeros(1, len(TOKEN_STATISTICS))
    compiled.write_tokens(logits, None, tokens, torch.zeros(1, dtype=torch.long))
    return compiled


class _Threads:
    """The threads of compiled loops: torch's own, since numba's OpenMP layer uses the OpenMP
    library that torch has loaded. Where numba has another layer, whose threads would compete with
    torch's, it is one."""

    def __init__(self) -> None:
        import numba

        self._get, self._set = numba.get_num_threads, numba.set_num_threads
        open_mp = ctypes.CDLL(None)
        n_threads, nested = open_mp.omp_get_max_threads(), open_mp.omp_get_nested()
        # Starts the layer, which sets both for torch as well. Not put back by torch's own function,
        # which would change how MKL adds up.
        self._set(self._get())
        open_mp.omp_set_num_threads(n_threads)
        open_mp.omp_set_nested(nested)
        most = numba.config.NUMBA_NUM_THREADS if numba.threading_layer() == "omp" else 1
        self.number: int = min(n_threads, most)
        self._all = self.number == numba.config.NUMBA_NUM_THREADS

    def run(self, many: bool, compiled: Callable[..., None], *arguments: Any) -> None:
        """Call it with its loops on all threads, if they are `many` enough; else on this one."""
        if many and self._all:
            # What numba does unasked. Asking takes locks, and as long as a tenth of a short step.
            compiled(*arguments)
            return
        before = self._get()  # of this thread
        self._set(self.number if many else 1)
        try:
            compiled(*arguments)
        finally:
            self._set(before)


def _numbers(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous float32 or bfloat16 tensor's numbers, bfloat16 as its 16 bits."""
    tensor = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    numbers: np.ndarray = tensor.numpy()
    return numbers


def _weights(layer: LayerRows) -> np.ndarray:
    """[G, H] the share of each head in its groups' means."""
    weights = np.zeros((len(layer.groups), layer.n_heads), np.float32)
    for group, heads in enumerate(layer.groups):
        weights[group, list(heads)] = 1 / max(1, len(heads))
    return weights


def _sinks(layer: LayerRows) -> np.ndarray:
    """[H] learnt scores; -inf, which has no weight, where there are none."""
    if layer.rule.sinks is None:
        return np.full(layer.n_heads, -np.inf, np.float32)
    scores: np.ndarray = layer.rule.sinks.float().numpy()
    return scores
