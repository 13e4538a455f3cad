"""What the command line shows while it works: rich on a terminal, plain lines in a log."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

console = Console(highlight=False, soft_wrap=True)


class Bar:
    """Progress of one long stage. `update(done, total, what)`; done never goes back."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._start = time.monotonic()
        self._progress = (
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[what]}"),
                console=console,
            )
            if console.is_terminal
            else None
        )
        self._task = self._progress.add_task(title, total=None, what="") if self._progress else None

    def __enter__(self) -> Bar:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def update(self, done: int, total: int, what: str) -> None:
        """Show that `done` of `total` are finished."""
        if self._progress and self._task is not None:
            self._progress.update(self._task, completed=done, total=total, what=what)
        else:
            seconds = time.monotonic() - self._start
            print(f"{self._title}: {done}/{total} after {seconds:.0f} s, {what}", flush=True)


def printable(text: str) -> str:
    """The text on one line, control characters (which may drive a terminal) as their escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(text: str) -> None:
    """One line to the user; never read as markup, since it may quote a prompt."""
    console.print(Text(printable(text)))


WIDTH = 120
"""Characters of a table where the output is no terminal."""


def table(title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Print rows of dicts; floats with three digits, None as a dash."""
    out = Table(title=title, title_justify="left")
    for column in columns:
        out.add_column(column.replace("_", " "))
    for row in rows:
        out.add_row(*(Text(printable(_cell(row.get(column)))) for column in columns))
    # A log has no edge: names and numbers need not be cut there.
    wide = console if console.is_terminal else Console(file=console.file, width=WIDTH)
    wide.print(out)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def print_json(value: Any) -> None:
    """Machine output: one JSON document on stdout and nothing else."""
    json.dump(value, sys.stdout, indent=1)
    sys.stdout.write("\n")


@contextmanager
def timed(timings: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds of the block to `timings[name]`."""
    start = time.monotonic()
    try:
        yield
    finally:
        timings[name] = round(timings.get(name, 0.0) + time.monotonic() - start, 2)
