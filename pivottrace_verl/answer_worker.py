"""The process in which answers are read and compared, at the other end of `answer_pool`.

Contract: one JSON line in asks for one operation on many items; the first line out says that the
operation is loaded, then comes one line an item: {"value": ...}, {"refused": true} for an item
whose shape is too much, {"over": true} for one that took too much memory, or {"error": sentence}.
Nothing is unpickled or evaluated. The process holds itself to a limit of memory, and ends with its
parent: at once on Linux, elsewhere when it next reads or after the time one item may take.
"""

import ctypes
import importlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

MODULES = {
    "math": "pivottrace_verl.answer_math",
    "own": "pivottrace_verl.answer_own",
    "reasoning_gym": "pivottrace_verl.answer_gym",
}
"""Where each kind's OPERATIONS are: name -> function of one item, after a call of `prepare`."""

_AHEAD = 4
"""Address space an item may ask for, as a multiple of the memory it may use: a number that
doubles until it does not fit has passed the one long before it reaches the other."""


class OverLimitError(Exception):
    """An item whose shape alone says that it would pass any limit."""


def main(parent: int, limit_s: float, memory: int) -> None:
    """Serve requests until standard input closes. `memory` in bytes, above what is loaded."""
    _end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A verifier that prints must not be taken for an answer.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        module = importlib.import_module(MODULES[request["kind"]])
        module.prepare(*request["about"])
        operation = module.OPERATIONS[request["operation"]]
        _limit(resource.RLIMIT_AS, _address_space() + _AHEAD * memory)
        _say(replies, {"ready": True})
        for item in request["items"]:
            _limit(resource.RLIMIT_CPU, int(_cpu_s() + limit_s) + 2)
            _say(replies, _reply(operation, item, memory))


def _reply(operation: Callable[[Any], Any], item: Any, memory: int) -> dict[str, Any]:
    before = _peak()
    try:
        value = operation(item)
    except OverLimitError:
        return {"refused": True}
    except MemoryError:
        return {"over": True}
    except Exception as error:  # noqa: BLE001 - raised again, as a sentence, on the other side
        return {"error": f"{type(error).__name__}: {error}"}
    # sympy and math-verify take a failed allocation for an unequal pair, so that the peak is
    # what tells an answer that did not fit.
    return {"over": True} if _peak() - before > memory else {"value": value}


def _say(replies: Any, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def _end_with(parent: int) -> None:
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)


def _limit(what: int, soft: int) -> None:
    hard = resource.getrlimit(what)[1]
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    resource.setrlimit(what, (soft, hard))


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _peak() -> int:
    """Most memory held so far, in bytes."""
    # getrusage's figure would do, but on Linux it begins at that of the process that started us.
    try:
        with open("/proc/self/status", "rb") as file:
            return int(file.read().partition(b"VmHWM:")[2].split()[0]) * 1024
    except FileNotFoundError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _address_space() -> int:
    """Bytes of address space in use; where the system does not say, what is resident."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except FileNotFoundError:
        return _peak()
