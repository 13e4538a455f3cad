"""Questions to the pool: asked once, and one at a time where one is all there is.

Contract: the memo is bounded, and callable from any thread; what timed out is remembered too, so
that a process gives one verdict on a pair, and pays for it once.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any

from pivottrace_verl import answer_pool
from pivottrace_verl.answer_pool import TIMED_OUT, Answer, TimedOut

_MOST = 65536
_LONGEST = 2048
"""Longer texts are rollouts, which do not repeat."""


class PooledAnswers(ABC):
    """A kind whose answers are compared in the pool: many at a time, which tells what timed out,
    or one at a time, where that is None or False."""

    symmetric = True
    """Whether `equal_many` says the same of a pair and its reverse."""

    @abstractmethod
    def extract_many(self, texts: Sequence[str]) -> list[Answer]: ...

    @abstractmethod
    def equal_many(self, pairs: Sequence[tuple[str, str]]) -> list[bool | TimedOut]: ...

    @abstractmethod
    def canonical_many(self, labels: Sequence[str]) -> list[Answer]: ...

    def extract(self, text: str) -> str | None:
        (answer,) = self.extract_many([text])
        return None if answer is TIMED_OUT else answer

    def equal(self, a: str, b: str) -> bool:
        return self.equal_many([(a, b)])[0] is True

    def canonical(self, label: str) -> str | None:
        (form,) = self.canonical_many([label])
        return None if form is TIMED_OUT else form


class Memo:
    """The pool's replies for one kind of answer; `about`: see `answer_pool.ask`."""

    def __init__(self, kind: str, about: Sequence[str] = ()) -> None:
        self._kind = kind
        self._about = about
        self._known: dict[tuple[str, Hashable], Any] = {}

    def ask(self, operation: str, items: Sequence[Any]) -> list[Any]:
        """[N] items -> [N] values, as `answer_pool.ask`; equal items are asked about once."""
        values = {item: self._known.get((operation, item), self) for item in items}
        unknown = [item for item, value in values.items() if value is self]
        asked = answer_pool.ask(self._kind, operation, unknown, self._about) if unknown else []
        for item, value in zip(unknown, asked, strict=True):
            values[item] = value
            if len(str(item)) <= _LONGEST:
                self._remember((operation, item), value)
        return [values[item] for item in items]

    def _remember(self, key: tuple[str, Hashable], value: Any) -> None:
        if len(self._known) >= _MOST:
            # The whole, not the oldest: no order to keep between threads.
            self._known = {}
        self._known[key] = value
