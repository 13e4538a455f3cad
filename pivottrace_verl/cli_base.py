"""What every verb of the command line shares: its arguments, its errors, the lock."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

import typer

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.pool import RunDir

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The run directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
P = ParamSpec("P")
R = TypeVar("R")

Seed = Annotated[int, typer.Option(help="Seed of every draw in this stage.")]


def told(verb: Callable[P, R]) -> Callable[P, R]:
    """Turn our own errors, a full disk and Ctrl-C into one line and an exit status."""

    @wraps(verb)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return verb(*args, **kwargs)
        except PivotTraceError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from error
        except OSError as error:
            print(f"error: {error.strerror or error}: {error.filename or ''}", file=sys.stderr)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            print("error: interrupted; the same command goes on here.", file=sys.stderr)
            raise typer.Exit(130) from error

    return wrapper


def opened(path: Path, stack: ExitStack) -> RunDir:
    """Open a run directory and hold its lock until the stack closes."""
    run = RunDir.open(path)
    stack.enter_context(run.lock())
    return run
