"""The messages of the channel: a msgpack header and raw little-endian numbers.

Nothing is unpickled, and what does not fit its header is an error.

Axes: T generated tokens, L the message's layers, H head groups, F features, K `TOKEN_STATISTICS`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from pivottrace_verl.attention.config import TOKEN_STATISTICS, WIRE_DTYPES
from pivottrace_verl.attention.parts import Part

QUEUE = 8192
"""Messages a socket holds before the sender drops."""
MAX_LAYERS = 4096
"""More than any model has; a place beyond it is malformed."""


class Header(msgspec.Struct, forbid_unknown_fields=True):
    """First frame of every message."""

    token: str
    kind: str
    """`hello` or `trace`."""
    key: str = ""
    shape: tuple[int, ...] = ()
    wire: str = "float32"
    missing_rows: int = 0
    lost: int = 0
    """Traces that this sender could not send so far."""
    info: dict[str, Any] = {}
    sender: str = ""
    """Which worker, by a random name."""
    part: Part | None = None
    """What this worker contributes to a trace; None: all of it."""


@dataclass(frozen=True)
class Arrived:
    """The numbers of one message: stats [T, L, H, F], token statistics [T, K], float32."""

    part: Part | None
    stats: np.ndarray
    tokens: np.ndarray
    missing_rows: int

    @property
    def number(self) -> int:
        return self.part.number if self.part else 0

    @property
    def of(self) -> int:
        return self.part.of if self.part else 1

    @property
    def nbytes(self) -> int:
        return self.stats.nbytes + self.tokens.nbytes


def encode(header: Header) -> bytes:
    """The first frame."""
    return msgspec.msgpack.encode(header)


def encode_rows(stats: np.ndarray, tokens: np.ndarray, wire: str) -> list[bytes]:
    """The second and third frame of a trace."""
    return [stats.astype(WIRE_DTYPES[wire]).tobytes(), tokens.astype("<f4").tobytes()]


def decode(frame: bytes) -> Header:
    """Raises msgspec.MsgspecError for anything but a header."""
    return msgspec.msgpack.decode(frame, type=Header)


def decode_rows(header: Header, frames: Sequence[bytes]) -> Arrived:
    """The numbers of a trace; `frames` with the header's.

    Raises ValueError or OverflowError where header and frames do not fit together.
    """
    if len(frames) != 3 or len(header.shape) != 4 or header.wire not in WIRE_DTYPES:
        raise ValueError(f"shape {header.shape} of {header.wire} in {len(frames)} frames")
    if min(header.shape) < 0:
        raise ValueError(f"shape {header.shape}")
    _check_part(header)
    stats = np.frombuffer(frames[1], WIRE_DTYPES[header.wire]).reshape(header.shape)
    tokens = np.frombuffer(frames[2], "<f4").reshape(header.shape[0], len(TOKEN_STATISTICS))
    # Copies in either case: a view would keep the whole message alive.
    return Arrived(
        header.part, stats.astype(np.float32), tokens.astype(np.float32), header.missing_rows
    )


def _check_part(header: Header) -> None:
    part = header.part
    if part is None:
        return
    _, n_layers, n_groups, _ = header.shape
    fits = (
        0 <= part.number < part.of
        and len(part.layers) == len(part.heads) == n_layers
        and all(0 <= layer < MAX_LAYERS for layer in part.layers)
        and all(len(heads) == n_groups and min(heads, default=0) >= 0 for heads in part.heads)
    )
    if not fits:
        raise ValueError(f"part {part} of shape {header.shape}")
