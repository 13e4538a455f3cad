"""How traces travel from an engine's worker to the process that owns the engine.

A ZeroMQ PUSH/PULL pair on this machine: the receiver binds an IPC socket in a directory only its
user may enter (loopback TCP where the path would be too long), and every message carries the
random token of its engine. A message is a msgpack header and raw little-endian numbers; nothing
is unpickled. A trace that is lost, late or incomplete is counted and reported as None.

Axes: T generated tokens, L traced layers, H head groups, F features, K `TOKEN_STATISTICS`.
"""

import asyncio
import hmac
import logging
import math
import os
import secrets
import shutil
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import zmq

from pivottrace_verl.attention.config import (
    ENV_CAPTURE,
    ENV_ENDPOINT,
    ENV_TOKEN,
    TOKEN_STATISTICS,
    WIRE_DTYPES,
    CaptureConfig,
)

logger = logging.getLogger(__name__)

QUEUE = 8192
"""Messages a socket holds before the sender drops."""
MAX_MESSAGE_BYTES = 1 << 30
MAX_GIVEN_UP = 65536
MAX_IPC_PATH = 100
"""sockaddr_un holds 107 characters."""


@dataclass(frozen=True)
class Trace:
    """Attention statistics of one rollout; row i is the query that emitted generated token i."""

    key: str
    stats: np.ndarray
    """[T, L, H, F] float32."""
    token_entropy: np.ndarray
    """[T] float32, nats, of the full next-token distribution at temperature 1."""
    self_certainty: np.ndarray
    """[T] float32, nats: KL(uniform || that distribution)."""

    def cut(self, n_tokens: int) -> "Trace":
        """The first `n_tokens` rows."""
        return Trace(
            self.key,
            self.stats[:n_tokens],
            self.token_entropy[:n_tokens],
            self.self_certainty[:n_tokens],
        )

    @staticmethod
    def join(parts: Sequence["Trace | None"]) -> "Trace | None":
        """One rollout generated in several requests, each continuing the one before on prompt and
        tokens so far: the parts' rows in order, under the first part's key. None if a part is
        missing: a trace has a row for every token or is none.

        Raises ValueError for no parts, or parts of different layers, groups or features.
        """
        whole = [part for part in parts if part is not None]
        if len(whole) < len(parts):
            return None
        shapes = {part.stats.shape[1:] for part in whole}
        if len(shapes) != 1:
            raise ValueError(
                f"The parts of one trace must be captured alike, not as {sorted(shapes)}."
            )
        return Trace(
            whole[0].key,
            np.concatenate([part.stats for part in whole]),
            np.concatenate([part.token_entropy for part in whole]),
            np.concatenate([part.self_certainty for part in whole]),
        )


class Header(msgspec.Struct, forbid_unknown_fields=True):
    """First frame of every message."""

    token: str
    kind: str
    key: str = ""
    shape: tuple[int, ...] = ()
    wire: str = "float32"
    missing_rows: int = 0
    lost: int = 0
    info: dict[str, Any] = {}


@dataclass(frozen=True)
class _Arrived:
    trace: Trace
    missing_rows: int


class Receiver:
    """Owner's end of the channel. Start it before the engine; one receiver per engine.

    Traces that nobody has collected yet are held up to `max_bytes`; beyond that the oldest go and
    are counted as dropped.
    """

    def __init__(self, config: CaptureConfig, max_bytes: int = 1 << 30) -> None:
        self.config = config
        self.engine: dict[str, Any] | None = None
        """What the worker said when it started: backend, isa, layers, head_groups, block_size."""
        self._max_bytes = max_bytes
        self._held_bytes = 0
        self._held: OrderedDict[str, _Arrived] = OrderedDict()
        self._waiting: dict[str, Future[_Arrived]] = {}
        self._given_up: OrderedDict[str, None] = OrderedDict()
        self._counts = dict.fromkeys(
            ("received", "rejected", "dropped", "late", "missing", "lost"), 0
        )
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._environment: dict[str, str] = {}

    @property
    def counters(self) -> dict[str, int]:
        """Traces received; messages rejected (wrong token, malformed); traces dropped because
        nobody collected them, late (asked for, given up), missing (reported as None), and lost
        (the sender's queue was full)."""
        with self._lock:
            return dict(self._counts)

    def start(self) -> None:
        """Bind the socket and set the environment that the engine's processes inherit."""
        if self._thread is not None:
            raise RuntimeError("This receiver was started already.")
        socket: zmq.Socket = zmq.Context.instance().socket(zmq.PULL)
        socket.set_hwm(QUEUE)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        directory = tempfile.mkdtemp(prefix="pivottrace-")
        # Also at exit, for an owner that ends without closing.
        self._remove_directory = weakref.finalize(self, shutil.rmtree, directory, True)
        path = os.path.join(directory, "traces")
        socket.bind(f"ipc://{path}" if len(path) <= MAX_IPC_PATH else "tcp://127.0.0.1:*")
        self._environment = {
            ENV_ENDPOINT: socket.getsockopt_string(zmq.LAST_ENDPOINT),
            ENV_TOKEN: secrets.token_hex(16),
            ENV_CAPTURE: self.config.to_json(),
        }
        os.environ.update(self._environment)
        self._thread = threading.Thread(
            target=self._listen, args=(socket,), name="pivottrace-receiver", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening and take back the environment; safe to call twice."""
        for name, value in self._environment.items():
            if os.environ.get(name) == value:
                del os.environ[name]
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._remove_directory()

    def __enter__(self) -> "Receiver":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def wait_ready(self, timeout: float = 30.0) -> dict[str, Any]:
        """What the engine's worker captures; vLLM only logs a plugin that failed to load, so an
        owner that relies on traces calls this once the engine is up.

        Raises RuntimeError when no worker has reported within `timeout` seconds.
        """
        if not self._ready.wait(timeout) or self.engine is None:
            raise RuntimeError(
                f"No vLLM worker reported that attention capture is installed within {timeout:g} "
                f"seconds: the receiver must be started before the engine, pivottrace-verl must "
                f"be installed where vLLM runs, and VLLM_PLUGINS, if set, must name pivottrace."
            )
        return self.engine

    def get(self, key: str, timeout: float = 5.0, n_tokens: int | None = None) -> Trace | None:
        """The trace of request `key`, once; None if it is not complete within `timeout` seconds.

        `n_tokens` is the number of tokens the caller has: rows beyond it are cut (an engine may
        compute one token past a stop), fewer rows than that are an incomplete trace.
        """
        future = self._claim(key)
        try:
            future.result(timeout)
        except FutureTimeout:
            logger.debug("Trace %s has not arrived after %g seconds.", key, timeout)
        return self._collect(key, future, n_tokens)

    async def aget(
        self, key: str, timeout: float = 5.0, n_tokens: int | None = None
    ) -> Trace | None:
        """`get` for asyncio."""
        future = self._claim(key)
        try:
            await asyncio.wait([asyncio.wrap_future(future)], timeout=timeout)
        except asyncio.CancelledError:
            self._collect(key, future, None)
            raise
        return self._collect(key, future, n_tokens)

    def _claim(self, key: str) -> "Future[_Arrived]":
        future: Future[_Arrived] = Future()
        with self._lock:
            if key in self._waiting:
                raise RuntimeError(f"Trace {key!r} is being waited for already.")
            self._given_up.pop(key, None)
            arrived = self._held.pop(key, None)
            if arrived is None:
                self._waiting[key] = future
            else:
                self._held_bytes -= _size(arrived.trace)
        if arrived is not None:
            future.set_result(arrived)
        return future

    def _collect(self, key: str, future: "Future[_Arrived]", n_tokens: int | None) -> Trace | None:
        with self._lock:
            self._waiting.pop(key, None)
            arrived = future.result() if future.done() and not future.cancelled() else None
            if arrived is None:
                self._counts["missing"] += 1
                self._given_up[key] = None
                if len(self._given_up) > MAX_GIVEN_UP:
                    self._given_up.popitem(last=False)
        if arrived is None:
            logger.warning("No attention trace of request %s arrived in time.", key)
            return None
        trace, rows = arrived.trace, len(arrived.trace.stats)
        if arrived.missing_rows or (n_tokens is not None and rows < n_tokens):
            with self._lock:
                self._counts["missing"] += 1
            logger.warning(
                "The attention trace of request %s is incomplete: %d rows, %d of them missing, "
                "for %s tokens.",
                key,
                rows,
                arrived.missing_rows,
                n_tokens,
            )
            return None
        if n_tokens is None or rows == n_tokens:
            return trace
        return trace.cut(n_tokens)

    def _listen(self, socket: zmq.Socket) -> None:
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        while not self._stop.is_set():
            if poller.poll(100):
                self._receive(socket.recv_multipart())
        socket.close(linger=0)

    def _receive(self, frames: Sequence[bytes]) -> None:
        try:
            header = msgspec.msgpack.decode(frames[0], type=Header)
            known = hmac.compare_digest(
                header.token.encode(), self._environment[ENV_TOKEN].encode()
            )
            arrived = _unpack(header, frames) if known and header.kind == "trace" else None
        except (msgspec.MsgspecError, ValueError, UnicodeError) as error:
            self._reject(f"A malformed message was rejected: {error}")
            return
        if not known:
            self._reject("A message with a wrong token was rejected.")
            return
        with self._lock:
            self._counts["lost"] = max(self._counts["lost"], header.lost)
        if arrived is not None:
            self._deliver(arrived)
        elif header.kind == "hello":
            self.engine = header.info
            self._ready.set()

    def _reject(self, why: str) -> None:
        with self._lock:
            self._counts["rejected"] += 1
        logger.warning(why)

    def _deliver(self, arrived: _Arrived) -> None:
        key = arrived.trace.key
        with self._lock:
            self._counts["received"] += 1
            future = self._waiting.pop(key, None)
            if future is None and key in self._given_up:
                del self._given_up[key]
                self._counts["late"] += 1
                return
            if future is None:
                self._hold(arrived)
                return
            # Under the lock, so that a waiter that gives up sees either nothing or the trace.
            if future.set_running_or_notify_cancel():
                future.set_result(arrived)

    def _hold(self, arrived: _Arrived) -> None:
        key = arrived.trace.key
        if key in self._held:
            self._held_bytes -= _size(self._held.pop(key).trace)
            self._counts["dropped"] += 1
        self._held[key] = arrived
        self._held_bytes += _size(arrived.trace)
        while self._held_bytes > self._max_bytes:
            _, oldest = self._held.popitem(last=False)
            self._held_bytes -= _size(oldest.trace)
            self._counts["dropped"] += 1


class Sender:
    """Worker's end: never blocks the engine; what does not fit the queue is lost and counted."""

    def __init__(self, endpoint: str, token: str, wire: str = "float32") -> None:
        self.lost = 0
        self._token = token
        self._wire = wire
        self._logged = -math.inf
        self._socket: zmq.Socket = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.set_hwm(QUEUE)
        # Long enough for the last traces of an engine that shuts down, short for a dead owner.
        self._socket.setsockopt(zmq.LINGER, 2000)
        self._socket.connect(endpoint)

    def hello(self, info: dict[str, Any]) -> None:
        """Say that this worker captures, and what."""
        self._send([_encode(Header(self._token, "hello", info=info))])

    def trace(self, key: str, stats: np.ndarray, tokens: np.ndarray, missing_rows: int) -> None:
        """Send stats [T, L, H, F] and token statistics [T, K]."""
        header = Header(self._token, "trace", key, stats.shape, self._wire, missing_rows, self.lost)
        dtype = WIRE_DTYPES[self._wire]
        self._send([_encode(header), stats.astype(dtype).tobytes(), tokens.astype("<f4").tobytes()])

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


def _encode(header: Header) -> bytes:
    return msgspec.msgpack.encode(header)


def _size(trace: Trace) -> int:
    return trace.stats.nbytes + trace.token_entropy.nbytes + trace.self_certainty.nbytes


def _unpack(header: Header, frames: Sequence[bytes]) -> _Arrived:
    """Raises ValueError where header and frames do not fit together."""
    if len(frames) != 3 or len(header.shape) != 4 or header.wire not in WIRE_DTYPES:
        raise ValueError(f"shape {header.shape} of {header.wire} in {len(frames)} frames")
    if min(header.shape) < 0:
        raise ValueError(f"shape {header.shape}")
    stats = np.frombuffer(frames[1], WIRE_DTYPES[header.wire]).reshape(header.shape)
    tokens = np.frombuffer(frames[2], "<f4").reshape(header.shape[0], len(TOKEN_STATISTICS))
    # Copies in either case: a view would keep the whole message alive.
    trace = Trace(header.key, stats.astype(np.float32), *tokens.T.astype(np.float32))
    return _Arrived(trace, header.missing_rows)
