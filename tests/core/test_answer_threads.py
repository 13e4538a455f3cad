"""Answers are read in threads, as verl's reward workers do."""

import gc
import sys
from concurrent.futures import ThreadPoolExecutor

from pivottrace_verl.answers import get_answers


class Litter:
    """Garbage whose end takes time, so that another thread gets its turn."""

    def __init__(self) -> None:
        self.me = self

    def __del__(self) -> None:
        sum(range(2000))


def test_expressions_are_read_in_many_threads_at_once() -> None:
    kind = get_answers("expression")

    def read(thread: int, depth: int = 0) -> list[str | None]:
        if depth < thread:
            return read(thread, depth + 1)
        found = []
        for i in range(400):
            for _ in range(i % 7):
                Litter()
            found.append(kind.canonical(f"({thread}+{i})*(3-{i})/(7+{i})"))
        return found

    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(10)
    try:
        with ThreadPoolExecutor(8) as threads:
            found = list(threads.map(read, range(8)))
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*threshold)
    assert all(form is not None for forms in found for form in forms)
