"""A worker's end of the channel: traces go out, and the engine never waits for it."""

import logging
import math
import secrets
import time
from typing import Any

import msgspec
import numpy as np
import zmq

from pivottrace_verl.attention.parts import Part
from pivottrace_verl.attention.wire import QUEUE, Header, encode, encode_rows

logger = logging.getLogger(__name__)


class Sender:
    """Never blocks the engine: what does not fit the queue, or finds nobody who listens, is lost
    and counted. `hello` comes first."""

    def __init__(
        self, endpoint: str, token: str, wire: str = "float32", part: Part | None = None
    ) -> None:
        self.lost = 0
        self._header = Header(token, "hello", wire=wire, sender=secrets.token_hex(8), part=part)
        self._logged = -math.inf
        self._socket: zmq.Socket = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.set_hwm(QUEUE)
        # An owner that is gone must not leave its engine a queue that grows.
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        # Long enough for the last traces of an engine that shuts down, short for a dead owner.
        self._socket.setsockopt(zmq.LINGER, 2000)
        self._socket.connect(endpoint)

    def hello(self, info: dict[str, Any], timeout: float = 30.0) -> None:
        """Say that this worker captures, and what.

        Raises RuntimeError when nobody listens within `timeout` seconds.
        """
        if not self._socket.poll(int(timeout * 1000), zmq.POLLOUT):
            raise RuntimeError(
                f"Attention capture was asked for, but nobody received its traces within "
                f"{timeout:g} seconds: the receiver must live as long as the engine, on the same "
                f"machine."
            )
        self._send([encode(msgspec.structs.replace(self._header, info=info))])

    def trace(self, key: str, stats: np.ndarray, tokens: np.ndarray, missing_rows: int) -> None:
        """Send stats [T, L, H, F] and token statistics [T, K]."""
        header = msgspec.structs.replace(
            self._header,
            kind="trace",
            key=key,
            shape=stats.shape,
            missing_rows=missing_rows,
            lost=self.lost,
        )
        self._send([encode(header), *encode_rows(stats, tokens, header.wire)])

    def close(self) -> None:
        self._socket.close()

    def _send(self, frames: list[bytes]) -> None:
        try:
            self._socket.send_multipart(frames, flags=zmq.NOBLOCK)
        except zmq.Again:
            self.lost += 1
            if time.monotonic() - self._logged > 10:
                self._logged = time.monotonic()
                logger.warning("%d attention traces were lost: nobody receives them.", self.lost)
