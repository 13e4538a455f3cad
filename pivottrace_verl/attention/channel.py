"""How traces travel from an engine's workers to the process that owns the engine.

A ZeroMQ PUSH/PULL pair on this machine (`sender` is the other end, `wire` the messages): the
receiver binds an IPC socket in a directory only its user may enter (loopback TCP where the path
would be too long), and every message carries the random token of its engine. A trace that is lost,
late or incomplete is counted and reported as None. Where an engine has several workers each sends
its part of a trace (`parts`), and the parts are joined when the last one is there.

Axes: T generated tokens, L traced layers, H head groups, F features.
"""

import asyncio
import hmac
import logging
import os
import secrets
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import zmq

from pivottrace_verl.attention.config import (
    ENV_CAPTURE,
    ENV_ENDPOINT,
    ENV_TOKEN,
    CaptureConfig,
)
from pivottrace_verl.attention.parts import merge
from pivottrace_verl.attention.wire import QUEUE, Arrived, decode, decode_rows
from pivottrace_verl.plugin import STATE, register_vllm

logger = logging.getLogger(__name__)

MAX_MESSAGE_BYTES = 1 << 30
MAX_GIVEN_UP = 65536
LOSSES = ("lost", "late", "dropped", "rejected")
"""The counters of `Receiver` that say why a trace is missing."""
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


@dataclass
class _Pending:
    """What has arrived of one trace, by part."""

    parts: dict[int, Arrived] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return all(len(self.parts) == part.of for part in self.parts.values())

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    @property
    def missing_rows(self) -> int:
        return max(part.missing_rows for part in self.parts.values())

    def to_trace(self, key: str) -> Trace:
        """Raises ValueError where the parts do not make one trace."""
        (stats, tokens), *more = ((part.stats, part.tokens) for part in self.parts.values())
        if more:
            stats, tokens = merge(
                [(a.part, a.stats, a.tokens) for a in self.parts.values() if a.part is not None]
            )
        return Trace(key, stats, *tokens.T)


class Receiver:
    """Owner's end of the channel. Start it before the engine; one receiver per engine, whose data
    parallel replicas share it.

    Traces that nobody has collected yet are held up to `max_bytes` (None: without a bound, for an
    owner that collects every one of its requests' traces); beyond that the oldest go, are counted
    as dropped, and whoever asks for one gets None at once. A key is one request's: once its trace
    was given up, whatever arrives under it is late, and never taken for that of another request.
    """

    def __init__(self, config: CaptureConfig, max_bytes: int | None = 1 << 30) -> None:
        self.config = config
        self.engine: dict[str, Any] | None = None
        """What the workers said when they started: backend, isa, layers, head_groups, ..."""
        self._max_bytes = max_bytes
        self._held_bytes = 0
        self._full = False
        """Whether a trace was dropped for lack of room, and that was told."""
        self._held: OrderedDict[str, _Pending] = OrderedDict()
        self._waiting: dict[str, Future[_Pending]] = {}
        self._given_up: OrderedDict[str, bool] = OrderedDict()
        """Keys, and whether what comes after all is counted already."""
        self._counts = dict.fromkeys(("received", "rejected", "dropped", "late", "missing"), 0)
        self._lost: dict[str, int] = {}
        self._workers: dict[str, int] = {}
        """Of each worker that said hello how many its engine has."""
        self._lock = threading.Lock()
        self._hello = threading.Condition(self._lock)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._environment: dict[str, str] = {}

    @property
    def counters(self) -> dict[str, int]:
        """Traces received whole; messages rejected (wrong token, malformed); traces dropped because
        nobody collected them, late (asked for, given up), missing (reported as None), and lost
        (the sender's queue was full, or nobody listened)."""
        with self._lock:
            return {**self._counts, "lost": sum(self._lost.values())}

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
        if STATE["vllm"]["calls"]:
            # vLLM loads plugins once per process, and here did before capture was asked for.
            register_vllm()
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

    def wait_ready(self, timeout: float = 30.0, engines: int = 1) -> dict[str, Any]:
        """What the workers of the `engines` data parallel replicas capture; vLLM only logs a plugin
        that failed to load, so an owner that relies on traces calls this once the engine is up.

        Raises RuntimeError when not every worker has reported within `timeout` seconds.
        """
        with self._hello:
            if not self._hello.wait_for(lambda: self._all_reported(engines), timeout):
                reported = len(self._workers)
                who = f"Only {reported} vLLM workers" if reported else "No vLLM worker"
                raise RuntimeError(
                    f"{who} reported that attention capture is installed within {timeout:g} "
                    f"seconds: the receiver must be started before the engine, pivottrace-verl "
                    f"must be installed where vLLM runs, and VLLM_PLUGINS, if set, must name "
                    f"pivottrace."
                )
        assert self.engine is not None
        return self.engine

    def _all_reported(self, engines: int) -> bool:
        workers = self._workers.values()
        return len(workers) > 0 and len(workers) >= engines * max(workers)

    def get(self, key: str, timeout: float = 5.0, n_tokens: int | None = None) -> Trace | None:
        """The trace of request `key`, once; None if it is not complete within `timeout` seconds.

        `n_tokens` is the number of tokens the caller has: rows beyond it are cut (an engine may
        compute one token past a stop), fewer rows than that are an incomplete trace.
        """
        future = self._claim(key)
        try:
            future.result(timeout)
        except (FutureTimeout, CancelledError):
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

    def give_up(self, key: str) -> None:
        """Say that nobody will ask for a trace: a request that failed, or ended without a token."""
        with self._lock:
            self._forget(key)
            self._mark_given_up(key, seen=True)

    def _mark_given_up(self, key: str, seen: bool) -> None:
        self._given_up.setdefault(key, seen)
        if len(self._given_up) > MAX_GIVEN_UP:
            self._given_up.popitem(last=False)

    def _claim(self, key: str) -> "Future[_Pending]":
        """A future of the whole trace; one that is cancelled if the key was given up before."""
        future: Future[_Pending] = Future()
        with self._lock:
            if key in self._waiting:
                raise RuntimeError(f"Trace {key!r} is being waited for already.")
            if key in self._given_up:
                future.cancel()
                return future
            pending = self._held.get(key)
            if pending is None or not pending.complete:
                self._waiting[key] = future
                return future
            self._forget(key)
        future.set_result(pending)
        return future

    def _collect(self, key: str, future: "Future[_Pending]", n_tokens: int | None) -> Trace | None:
        with self._lock:
            self._waiting.pop(key, None)
            pending = future.result() if future.done() and not future.cancelled() else None
            if pending is None:
                partial = self._forget(key)
                self._counts["missing"] += 1
                self._mark_given_up(key, seen=partial is not None)
        if future.cancelled():
            return None  # given up or dropped before, and told then
        if pending is None:
            arrived = len(partial.parts) if partial else 0
            logger.warning(
                "No attention trace of request %s arrived in time%s.",
                key,
                f" (only {arrived} of its workers' parts)" if arrived else "",
            )
            return None
        try:
            trace = pending.to_trace(key)
        except ValueError as error:
            self._miss(f"The attention trace of request {key} cannot be joined: {error}.")
            return None
        rows, missing_rows = len(trace.stats), pending.missing_rows
        if missing_rows or (n_tokens is not None and rows < n_tokens):
            self._miss(
                f"The attention trace of request {key} is incomplete: {rows} rows, {missing_rows} "
                f"of them missing, for {n_tokens} tokens."
            )
            return None
        return trace if n_tokens is None or rows == n_tokens else trace.cut(n_tokens)

    def _miss(self, why: str) -> None:
        with self._lock:
            self._counts["missing"] += 1
        logger.warning(why)

    def _listen(self, socket: zmq.Socket) -> None:
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        while not self._stop.is_set():
            if poller.poll(100):
                self._receive(socket.recv_multipart())
        socket.close(linger=0)

    def _receive(self, frames: Sequence[bytes]) -> None:
        try:
            header = decode(frames[0])
            known = hmac.compare_digest(
                header.token.encode(), self._environment[ENV_TOKEN].encode()
            )
            arrived = decode_rows(header, frames) if known and header.kind == "trace" else None
        except (msgspec.MsgspecError, ValueError, OverflowError) as error:
            self._reject(f"A malformed message was rejected: {error}")
            return
        if not known:
            self._reject("A message with a wrong token was rejected.")
            return
        with self._lock:
            self._lost[header.sender] = header.lost
            if arrived is not None:
                self._deliver(header.key, arrived)
            elif header.kind == "hello":
                self.engine = header.info
                self._workers[header.sender] = header.part.of if header.part else 1
                self._hello.notify_all()

    def _reject(self, why: str) -> None:
        with self._lock:
            self._counts["rejected"] += 1
        logger.warning(why)

    def _deliver(self, key: str, arrived: Arrived) -> None:
        """Under the lock, so that a waiter that gives up sees either nothing or the trace."""
        if key in self._given_up:
            self._counts["late"] += not self._given_up[key]
            self._given_up[key] = True
            return
        pending = self._held.get(key)
        if pending is not None and (pending.complete or arrived.number in pending.parts):
            self._forget(key)
            self._counts["dropped"] += 1
            pending = None
        if pending is None:
            pending = self._held[key] = _Pending()
        pending.parts[arrived.number] = arrived
        self._held_bytes += arrived.nbytes
        if pending.complete:
            self._counts["received"] += 1
            future = self._waiting.pop(key, None)
            if future is not None:
                self._forget(key)
                if future.set_running_or_notify_cancel():
                    future.set_result(pending)
        while self._max_bytes is not None and self._held_bytes > self._max_bytes:
            self._drop(next(iter(self._held)))

    def _drop(self, key: str) -> None:
        """There is no room for a trace: whoever waits for it, or will, need not."""
        if not self._full:
            self._full = True
            logger.warning(
                "More than %s bytes of attention traces wait to be collected: the oldest are "
                "dropped from now on.",
                self._max_bytes,
            )
        self._counts["dropped"] += 1
        self._forget(key)
        self._mark_given_up(key, seen=True)
        waiting = self._waiting.pop(key, None)
        if waiting is not None:
            waiting.cancel()

    def _forget(self, key: str) -> _Pending | None:
        """Take a trace out of those held."""
        pending = self._held.pop(key, None)
        if pending is not None:
            self._held_bytes -= pending.nbytes
        return pending
