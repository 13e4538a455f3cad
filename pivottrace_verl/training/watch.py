"""What ends a training that can no longer go on, where verl would wait for ever.

verl polls for finished rollouts without a limit: a process that dies with rollouts in it leaves
them "running", and nobody is told. `Watch` asks every process that rollouts pass through for a sign
of life; when one is dead, the main thread is interrupted, whatever it waits for, and what it was
doing ends with one sentence. `Patience` bounds the wait for the next finished prompt.

    with Watch({"agent-loop worker 0": worker.__ray_ready__.remote, ...}):
        super().fit(manager)

An actor that is busy is not dead: only Ray's own word for it counts, or the PivotTraceError that
the sign of life raises, whose sentence is the one to end with.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from types import FrameType, TracebackType
from typing import Any

import ray

from pivottrace_verl.errors import PivotTraceError

POLL_S = 2.0
"""Seconds between two rounds."""
LAST_LOOK_S = 0.5
"""Seconds that signs of life have to come when the block is left in peace."""
LOST = (
    "Rollouts were lost with it, so training stops; started again, it goes on from the last "
    "checkpoint."
)
"""What the death of a process means."""
GRACE_S = 60.0
"""Seconds that an interrupted main thread has to leave the block; then the process ends."""


class Watch:
    """Watches from `with` to its end; an error that leaves the block while something is dead
    becomes a PivotTraceError that says so, and what a process refuses is raised at the latest when
    the block is left."""

    def __init__(self, signs: Mapping[str, Callable[[], Any]]) -> None:
        self._signs = dict(signs)
        """Name of a process -> asks it for a sign of life and returns Ray's reference to it."""
        self._asked: dict[Any, str] = {}
        self._left = threading.Event()
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._inside = False
        self._said: str | None = None
        self._refused = False
        self._thread = threading.Thread(target=self._run, name="pivottrace-watch", daemon=True)

    def __enter__(self) -> Watch:
        # Ray's workers block it, and only KeyboardInterrupt comes out of `ray.get`.
        self._handler = signal.signal(signal.SIGINT, self._interrupted)
        self._mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        self._thread.start()
        self._inside = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._inside = False
        with self._sending:
            self._left.set()
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
        if error is None:
            # Steps may be shorter than a round: rollouts that were refused in the last ones are
            # missing. A process that dies after them is not missed.
            self.look(timeout=LAST_LOOK_S)
            if self._refused:
                raise PivotTraceError(self._said)
            return
        if self._said is None and not isinstance(error, PivotTraceError):
            # verl may meet the dead process before the next round does.
            self.look(timeout=POLL_S)
        if self._said is not None:
            raise PivotTraceError(self._said) from error

    def _interrupted(self, _: int, frame: FrameType | None) -> None:
        """Ours are for the block: what comes while it is entered comes again, and what comes while
        it is left, from the first line of `__exit__` on, is said there."""
        leaving = frame is not None and frame.f_code is Watch.__exit__.__code__
        if self._said is None or (self._inside and not leaving):
            raise KeyboardInterrupt

    def look(self, timeout: float = 0.0) -> str | None:
        """Collect signs of life and ask for the next; the sentence to end with, if one is dead."""
        with self._lock:
            for name in set(self._signs) - set(self._asked.values()):
                self._asked[self._signs[name]()] = name
            ready, _ = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=timeout)
            for reference in ready:
                name = self._asked.pop(reference)
                try:
                    ray.get(reference)
                except ray.exceptions.ActorUnavailableError:
                    continue  # a network that fails for a moment is no death
                except (ray.exceptions.RayError, PivotTraceError) as error:
                    said = getattr(error, "cause", None)
                    self._refused = isinstance(said, PivotTraceError)
                    self._said = str(said) if self._refused else f"The {name} died. {LOST}"
            return self._said

    def _run(self) -> None:
        while self.look() is None and not self._left.wait(POLL_S):
            pass
        if self._said is None:
            return
        print(f"pivottrace: {self._said}", file=sys.stderr, flush=True)
        deadline = time.monotonic() + GRACE_S
        main = threading.main_thread().ident
        # Again and again: asyncio takes the first for a request to cancel.
        while main is not None and not self._left.is_set():
            if time.monotonic() > deadline:
                os._exit(1)
            # Not while the block is being left: it would reach what comes after.
            with self._sending:
                if not self._left.is_set():
                    signal.pthread_kill(main, signal.SIGINT)
            self._left.wait(POLL_S)


class Patience:
    """The longest time between two looks at the same state."""

    def __init__(self, limit_s: float | None) -> None:
        self._limit_s = math.inf if limit_s is None else float(limit_s)
        self._state: Hashable = None
        self._since = 0.0

    def look(self, state: Hashable) -> None:
        """Raises PivotTraceError if `state` has been the same for longer than the limit."""
        now = time.monotonic()
        if state != self._state:
            self._state, self._since = state, now
        elif now - self._since > self._limit_s:
            raise PivotTraceError(
                f"No prompt's rollouts finished in {self._limit_s:g} s, so training stops; if they "
                "may take longer, raise pivottrace.stall_timeout_s."
            )
