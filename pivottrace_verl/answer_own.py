"""A verifier of the user's own, by import path, in the worker processes of `answer_pool`.

Contract: the factory is called without arguments, once here, to see that it makes a verifier, and
once in each worker, where all questions are answered: one that takes too long, or too much memory,
is TIMED_OUT like any other. What the factory loads counts for neither limit. An error in the
verifier stops the run with a sentence that names it and the answer.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from pivottrace_verl.answer_memo import Memo, PooledAnswers
from pivottrace_verl.answer_pool import Answer, TimedOut
from pivottrace_verl.errors import PivotTraceError


class OwnAnswers(PooledAnswers):
    """The answers of `made`, which `path` (`pkg.module:factory`) gave in this process."""

    symmetric = False

    def __init__(self, path: str, made: Any) -> None:
        self._path = path
        self.canonical_decides = bool(getattr(made, "canonical_decides", False))
        # Workers may have been started before the path to the module was known.
        self._memo = Memo("own", (path, *map(os.path.abspath, sys.path)))

    def extract_many(self, texts: Sequence[str]) -> list[Answer]:
        return self._ask("extract", [(text,) for text in texts])

    def canonical_many(self, labels: Sequence[str]) -> list[Answer]:
        return self._ask("canonical", [(label,) for label in labels])

    def equal_many(self, pairs: Sequence[tuple[str, str]]) -> list[bool | TimedOut]:
        return self._ask("equal", pairs)

    def _ask(self, method: str, items: Sequence[tuple[str, ...]]) -> list[Any]:
        found = self._memo.ask(method, items)
        for item, value in zip(items, found, strict=True):
            if isinstance(value, dict):
                shown = ", ".join(repr(text[-200:]) for text in item)
                raise PivotTraceError(
                    f"The verifier {self._path} {value['did']} in {method}({shown}){value['why']}."
                )
        return found


def make(path: str) -> Any:
    """What the factory of that path makes."""
    module, _, factory = path.partition(":")
    return getattr(importlib.import_module(module), factory)()


# From here on: what runs in the worker.

_made: dict[str, Any] = {}
_now: list[str] = []


def prepare(path: str, *folders: str) -> None:
    """Make the verifier that the next items are for."""
    sys.path += [folder for folder in folders if folder not in sys.path]
    if path not in _made:
        _made[path] = make(path)
    _now[:] = [path]


def _call(method: str, item: Sequence[str]) -> Any:
    try:
        value = getattr(_made[_now[0]], method)(*item)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - raised again, as a sentence, on the other side
        return {"did": "failed", "why": f": {type(error).__name__}: {error}"}
    if method == "equal":
        return bool(value)
    if value is None or isinstance(value, str):
        return value
    why = ", but must give text or None"
    return {"did": f"gave a {type(value).__name__}", "why": why}


OPERATIONS = {
    "extract": lambda item: _call("extract", item),
    "canonical": lambda item: _call("canonical", item),
    "equal": lambda item: _call("equal", item),
}
