"""Worker processes that read and compare answers within a limit of time and memory.

Contract: `ask` runs an operation of `answer_worker` on every item and gives, item by item, its
value or TIMED_OUT. A worker that is over a limit is killed and replaced, and only the item it was
at is lost. Workers are started on first use, by executing Python anew (never by forking a process
that may hold threads or a GPU, and never by running the caller's main module again), and end with
the process that asked, even one that is killed. Callable from any thread; a call made from
asyncio belongs into `asyncio.to_thread`.

    ask("math", "equal", [("1/2", "0.5"), ("2^{10^{10}}", "3")])    # [True, TIMED_OUT]

Limits are `Limits`, set by `set_limits` or in the environment: PIVOTTRACE_ANSWER_WORKERS,
PIVOTTRACE_ANSWER_SECONDS and PIVOTTRACE_ANSWER_MEMORY_MB, which reach Ray's workers too.
"""

import atexit
import enum
import json
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from pivottrace_verl.errors import PivotTraceError

_CHUNK = 64
"""Items a request, so that a slow one holds up few others."""
_START_S = 120.0
"""Longest wait for a worker to import its libraries."""


class TimedOut(enum.Enum):
    """The type of TIMED_OUT."""

    TIMED_OUT = "timed_out"


TIMED_OUT: Final = TimedOut.TIMED_OUT
"""In place of an answer or a comparison that was over the limit of time or memory."""

Answer: TypeAlias = str | TimedOut | None
"""What is read from a rollout's text; None is unparseable."""


@dataclass(frozen=True)
class Limits:
    """What the answers of this process may cost."""

    workers: int = min(4, os.cpu_count() or 1)
    seconds: float = 5.0
    """Wall-clock time one answer or comparison may take."""
    memory_mb: int = 256
    """Memory one answer or comparison may take."""

    def __post_init__(self) -> None:
        if self.workers < 1 or self.memory_mb < 1 or not 0 < self.seconds < float("inf"):
            raise PivotTraceError(
                f"Answers are compared by {self.workers} workers within {self.seconds} s and "
                f"{self.memory_mb} MB, but each of the three must be above zero and finite."
            )

    @classmethod
    def from_environment(cls) -> "Limits":
        """The defaults, where the environment does not say otherwise."""
        given: dict[str, Any] = {}
        for field, name, number in (
            ("workers", "PIVOTTRACE_ANSWER_WORKERS", int),
            ("seconds", "PIVOTTRACE_ANSWER_SECONDS", float),
            ("memory_mb", "PIVOTTRACE_ANSWER_MEMORY_MB", int),
        ):
            text = os.environ.get(name)
            if text is None:
                continue
            try:
                given[field] = number(text)
            except ValueError as error:
                raise PivotTraceError(f"{name} is '{text}', but must be a number.") from error
        return cls(**given)


class _Worker:
    """One process and the two pipes to it."""

    def __init__(self, limits: Limits) -> None:
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-c"),
                "from pivottrace_verl.answer_worker import main; "
                f"main({os.getpid()}, {limits.seconds!r}, {limits.memory_mb << 20})",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            # A fixed hash seed, because sympy's order of terms, hence its time, depends on it.
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                "PYTHONHASHSEED": "0",
            },
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        self._poll = select.poll()
        self._poll.register(self._replies, select.POLLIN)
        self._read = b""
        self.used = False

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, request: dict[str, Any]) -> bool:
        """False if the process is gone."""
        left = memoryview(json.dumps(request).encode() + b"\n")
        try:
            while left:
                left = left[self._requests.write(left) :]
        except BrokenPipeError:
            return False
        return True

    def reply(self, seconds: float) -> dict[str, Any] | None:
        """The next line; None if it does not come in time or the process is gone."""
        until = time.monotonic() + seconds
        while b"\n" not in self._read:
            wait = until - time.monotonic()
            if wait <= 0 or not self._poll.poll(wait * 1000):
                return None
            block = self._replies.read(65536)
            if not block:
                return None
            self._read += block
        line, _, self._read = self._read.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        return found

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._requests.close()
        self._replies.close()


class _Pool:
    """As many workers as the limits allow, each lent to one thread at a time."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        # Last in, first out: a worker that is warm is used before another one is started.
        self._free: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(limits.workers):
            self._free.put(None)
        self._closed = False

    def ask(
        self, kind: str, operation: str, items: Sequence[Any], about: Sequence[str]
    ) -> list[Any]:
        chunks = [items[i : i + _CHUNK] for i in range(0, len(items), _CHUNK)]
        if len(chunks) <= 1 or self.limits.workers == 1:
            found = [self._chunk(kind, operation, chunk, about) for chunk in chunks]
        else:
            with ThreadPoolExecutor(min(self.limits.workers, len(chunks))) as threads:
                found = list(threads.map(lambda c: self._chunk(kind, operation, c, about), chunks))
        return [value for values in found for value in values]

    def _chunk(
        self, kind: str, operation: str, items: Sequence[Any], about: Sequence[str]
    ) -> list[Any]:
        values: list[Any] = []
        worker = self._free.get()
        try:
            while len(values) < len(items):
                worker = self._ready(worker, kind, operation, items[len(values) :], about)
                while len(values) < len(items):
                    reply = worker.reply(self.limits.seconds)
                    if reply is None or "over" in reply:
                        values.append(TIMED_OUT)
                        worker.kill()
                        worker = None
                        break
                    if "refused" in reply:
                        values.append(TIMED_OUT)
                        continue
                    if "error" in reply:
                        raise PivotTraceError(
                            f"The {kind} verifier failed to {operation} "
                            f"{str(items[len(values)])[:200]!r}: {reply['error']}."
                        )
                    values.append(reply["value"])
        except BaseException:
            # Replies to this request may still come: they must not meet the next one.
            if worker is not None:
                worker.kill()
                worker = None
            raise
        finally:
            self._free.put(worker)
            if self._closed:
                self.close()
        return values

    def _ready(
        self,
        worker: _Worker | None,
        kind: str,
        operation: str,
        items: Sequence[Any],
        about: Sequence[str],
    ) -> _Worker:
        """A worker that has this request before it; a new one if the given one is gone."""
        request = {"kind": kind, "operation": operation, "items": list(items), "about": about}
        while True:
            if worker is None:
                worker = _shared.starter.submit(_Worker, self.limits).result()
            if worker.send(request) and worker.reply(_START_S) is not None:
                worker.used = True
                return worker
            used, pid = worker.used, worker.pid
            worker.kill()
            worker = None
            if not used:
                raise PivotTraceError(
                    f"The process that compares {kind} answers (pid {pid}) ended before it "
                    "compared any; what it wrote to stderr says why."
                )

    def close(self) -> None:
        """End the workers that are free now, and the lent ones when they come back."""
        self._closed = True
        free = []
        while True:
            try:
                free.append(self._free.get_nowait())
            except queue.Empty:
                break
        for worker in free:
            if worker is not None:
                worker.kill()
            # The place stays: a thread may be waiting for it.
            self._free.put(None)


class _Shared:
    """What all threads of this process share, and a forked child does not."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.lock = threading.Lock()
        self.pool: _Pool | None = None
        # Linux ends a worker with the thread that started it: this one stays with the process.
        self.starter = ThreadPoolExecutor(1, thread_name_prefix="answer-workers")

    def replace(self, pool: _Pool | None) -> None:
        with self.lock:
            before, self.pool = self.pool, pool
        if before is not None:
            before.close()


_shared = _Shared()


def ask(kind: str, operation: str, items: Sequence[Any], about: Sequence[str] = ()) -> list[Any]:
    """[N] items -> [N] values, TIMED_OUT for an item that was over a limit. `about` is what the
    worker's `prepare` has to know of the kind.

    Raises PivotTraceError if a worker cannot be started or a verifier fails.
    """
    if not items:
        return []
    with _shared.lock:
        if _shared.pool is None:
            _shared.pool = _Pool(Limits.from_environment())
        pool = _shared.pool
    return pool.ask(kind, operation, items, about)


def set_limits(limits: Limits) -> None:
    """Use these limits from now on; workers started under others end."""
    _shared.replace(_Pool(limits))


def close() -> None:
    """End the workers; the next `ask` starts new ones, under the environment's limits."""
    _shared.replace(None)


atexit.register(close)
os.register_at_fork(after_in_child=_shared.forget)
