"""Where rows wait on the device: a store indexed by KV slot, and how it is written and read.

`DeviceStore` is what `store.SlotStore` is on the CPU: a row lives where the key of its token lives,
and the slot remembers whose row it is. It is written by kernels only. `StepRows` are the buffers by
which the kernels of a step learn whose rows these are; they stay where they are, so that a captured
CUDA graph reads new contents when it is replayed.

Contract: nothing here waits for the device, `Reading.wait` apart. A step costs one copy of a few
kilobytes to the device; a read is enqueued before the step that may overwrite its rows, is gathered
into memory made once (`STAGES`), and travels to the host on a stream of its own. So reads take no
memory of the device, however many requests finish in a step; past `STAGES * STAGE_ROWS` rows on
their way the device waits for the first of them to leave.

Axes: R requests of a batch, slots of the KV cache, T rows read, L traced layers, G head groups,
F features, K `TOKEN_STATISTICS`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle

import numpy as np
import torch

from pivottrace_verl.attention.config import TOKEN_STATISTICS
from pivottrace_verl.attention.store import NOBODY

HOST_BUFFERS = 4
"""Steps whose copies to the device may be under way at once: asynchronous scheduling has two."""


STAGES, STAGE_ROWS = 4, 1 << 15
"""Rooms on the device, and rows in each, through which rows leave."""


class StepRows:
    """Prompt length, response start, owner and written slot of each request of a step, in batch
    order; [R] int32. The start is the prompt length P, or less where a request goes on with a
    response: its rows begin at P - 1 all the same.

    `prompts` is -1 for a request that did not ask and for padding, and the kernels leave it alone.
    The kernel of the last traced layer notes in `slots` where it wrote a row; that it stays -1
    otherwise shows that the kernels ran, in Python or replayed.
    """

    def __init__(self, max_requests: int, device: torch.device | str) -> None:
        pinned = torch.device(device).type == "cuda"
        shape = (4, max_requests)
        host = [
            torch.empty(shape, dtype=torch.int32, pin_memory=pinned) for _ in range(HOST_BUFFERS)
        ]
        self._host = cycle([(buffer, _Moment(pinned)) for buffer in host])
        self._rows = torch.full(shape, -1, dtype=torch.int32, device=device)
        self.prompts, self.responses, self.owners, self.slots = self._rows
        self._clear = True
        self.n_requests = 0

    @property
    def are_clear(self) -> bool:
        """True when kernels launched now leave everything alone."""
        return self._clear

    def fill(self, prompts: np.ndarray, responses: np.ndarray, owners: np.ndarray) -> None:
        """The requests of the next step: prompt lengths, -1 for one that did not ask; where their
        responses begin; owners."""
        self.n_requests = len(prompts)
        asked = bool((prompts >= 0).any())
        if not asked and self._clear:
            return
        host, copied = next(self._host)
        copied.wait()
        host.fill_(-1)
        for row, values in zip(host, (prompts, responses, owners), strict=False):
            row[: len(values)] = torch.from_numpy(values)
        self._rows.copy_(host, non_blocking=True)
        copied.record()
        self._clear = not asked

    def clear(self) -> None:
        """No rows in the next step: a dummy batch, a warm-up, a capture of graphs."""
        nobody = np.empty(0, np.int32)
        self.fill(nobody, nobody, nobody)


class _Moment:
    """A point in the current stream's work; on the CPU everything is done when it is enqueued."""

    def __init__(self, on_gpu: bool) -> None:
        self._event = torch.cuda.Event() if on_gpu else None
        self._recorded = False

    def record(self) -> None:
        if self._event is not None:
            self._event.record()
            self._recorded = True

    def passed(self) -> bool:
        return self._event is None or not self._recorded or bool(self._event.query())

    def wait(self) -> None:
        if not self.passed() and self._event is not None:
            self._event.synchronize()

    def hold(self, stream: torch.cuda.Stream) -> None:
        """Make later work of `stream` come after this."""
        if self._event is not None:
            stream.wait_event(self._event)


class Reading:
    """Rows on their way to the host."""

    def __init__(
        self, parts: list[torch.Tensor], owner: int, sent: _Moment, index: torch.Tensor
    ) -> None:
        self.n_rows = len(parts[2])
        """Rows that count; whoever asked may lower it."""
        self._parts, self._owner, self._sent = parts, owner, sent
        # What the device still reads from must not be handed to others before it did.
        self._index: torch.Tensor | None = index

    @property
    def ready(self) -> bool:
        return self._sent.passed()

    def wait(self) -> tuple[np.ndarray, np.ndarray, int]:
        """stats [T, L, G, F], token statistics [T, K], and how many rows are not the owner's."""
        self._sent.wait()
        self._index = None
        stats, tokens, owners = (part[: self.n_rows].numpy() for part in self._parts)
        return stats, tokens, int((owners != self._owner).sum())


class _Stage:
    """Room for `STAGE_ROWS` rows of the stores, on their way out."""

    def __init__(self, stores: list[torch.Tensor], on_gpu: bool) -> None:
        self._index = torch.empty(STAGE_ROWS, dtype=torch.int64, device=stores[0].device)
        self._rows = [store.new_empty(STAGE_ROWS, *store.shape[1:]) for store in stores]
        self._on_gpu = on_gpu
        self.left = _Moment(on_gpu)
        """When the rows that were here last have left."""

    def gather(self, stores: list[torch.Tensor], index: torch.Tensor) -> list[torch.Tensor]:
        """Rows `index` of the stores, in place here, in the order of the current stream's work."""
        if self._on_gpu:
            self.left.hold(torch.cuda.current_stream(self._index.device))
        on_device = self._index[: len(index)].copy_(index, non_blocking=True)
        return [
            torch.index_select(store, 0, on_device, out=rows[: len(index)])
            for store, rows in zip(stores, self._rows, strict=True)
        ]


class DeviceStore:
    """stats [slots, L, G, F] and token statistics [slots, K] in float32, and each slot's owner.

    Memory is 4 (L G F + K + 1) bytes per slot; see `bytes_per_slot`.
    """

    def __init__(
        self,
        n_slots: int,
        n_layers: int,
        n_groups: int,
        n_features: int,
        device: torch.device | str,
    ) -> None:
        self.stats = torch.empty(n_slots, n_layers, n_groups, n_features, device=device)
        self.tokens = torch.empty(n_slots, len(TOKEN_STATISTICS), device=device)
        self.owner = torch.full((n_slots,), NOBODY, dtype=torch.int32, device=device)
        self._on_gpu = self.stats.device.type == "cuda"
        self._stream = torch.cuda.Stream(self.stats.device) if self._on_gpu else None
        self._stores = [self.stats, self.tokens, self.owner]
        self._stages = cycle([_Stage(self._stores, self._on_gpu) for _ in range(STAGES)])

    @staticmethod
    def bytes_per_slot(n_layers: int, n_groups: int, n_features: int) -> int:
        return 4 * (n_layers * n_groups * n_features + len(TOKEN_STATISTICS) + 1)

    def read(self, slots: np.ndarray, owner: int) -> Reading:
        """Start to read the rows at `slots` [T], as they are when the current stream gets here."""
        index = torch.from_numpy(slots)
        if self._on_gpu:
            index = index.pin_memory()
        parts = [
            torch.empty(len(slots), *store.shape[1:], dtype=store.dtype, pin_memory=self._on_gpu)
            for store in self._stores
        ]
        sent = _Moment(self._on_gpu)
        for begin in range(0, len(slots), STAGE_ROWS):
            stage, end = next(self._stages), begin + STAGE_ROWS
            gathered = _Moment(self._on_gpu)
            found = stage.gather(self._stores, index[begin:end])
            gathered.record()
            with self._aside(gathered):
                for part, rows in zip(parts, found, strict=True):
                    part[begin:end].copy_(rows, non_blocking=True)
                stage.left.record()
                sent.record()
        return Reading(parts, owner, sent, index)

    @contextmanager
    def _aside(self, after: _Moment) -> Iterator[None]:
        """Work of the stream that copies to the host, which waits for `after`."""
        if self._stream is None:
            yield
            return
        after.hold(self._stream)
        with torch.cuda.stream(self._stream):
            yield
