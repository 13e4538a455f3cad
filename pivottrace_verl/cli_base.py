"""What every verb of the command line shares: its arguments, its errors, the lock.

Contract: whatever goes wrong through bad input is one line on stderr that a person can act on, at
most `LONGEST` characters and without control characters, since it may quote a file.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.files import os_reason
from pivottrace_verl.ledger import TornLedgerWarning
from pivottrace_verl.pool import RunDir
from pivottrace_verl.ui import printable

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The run directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
P = ParamSpec("P")
R = TypeVar("R")

Seed = Annotated[int, typer.Option(help="Seed of every draw in this stage.")]

MaxUnanswered = Annotated[
    float,
    typer.Option(help="Review a prompt if more of its rollouts are unparseable or timed out."),
]
MaxTruncated = Annotated[
    float, typer.Option(help="The same for truncated ones, whether or not they answer; 1: never.")
]

EngineOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--engine",
        metavar="NAME=VALUE",
        help="One of vLLM's engine arguments, such as tensor_parallel_size=8 or "
        "gpu_memory_utilization=0.6; may be repeated.",
    ),
]


NOT_OPTIONS = {
    "model": "the model is the one that `pivottrace init` was given",
    "max_model_len": "the context is --max-prompt-tokens and --max-tokens together",
    "enable_sleep_mode": "it is on where --capture replay needs it",
}
"""Engine arguments that are not the user's, and why."""


def engine_options(words: list[str] | None) -> dict[str, Any]:
    """Engine arguments by name; a value is read as JSON, and is itself if it is none."""
    found: dict[str, Any] = {}
    for word in words or ():
        name, separator, text = word.partition("=")
        if not separator or not name.isidentifier():
            raise PivotTraceError(f"--engine takes NAME=VALUE, not {word!r}.")
        if name in NOT_OPTIONS:
            raise PivotTraceError(f"--engine cannot set {name}: {NOT_OPTIONS[name]}.")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


LONGEST = 1500
"""Characters of an error message; the middle of a longer one is left out."""

UsageError: type[Any] = typer.BadParameter.__mro__[1]
"""A wrong command line: click's class, or that of the copy of click which newer Typers carry."""


def complain(text: str, kind: str = "error") -> None:
    """One line on stderr."""
    text = printable(text)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST * 2 // 3]} ... {text[-LONGEST // 3 :]}"
    print(f"{kind}: {text}", file=sys.stderr)


def told(verb: Callable[P, R]) -> Callable[P, R]:
    """Turn our own errors, a full disk and Ctrl-C into one line and an exit status."""

    @wraps(verb)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            _check_finite(kwargs)
            with _torn_ledgers_told():
                return verb(*args, **kwargs)
        except PivotTraceError as error:
            complain(str(error))
            raise typer.Exit(2) from error
        except OSError as error:
            complain(f"{error.filename or 'The system'} cannot be used: {os_reason(error)}.")
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            complain("interrupted; the same command goes on here.")
            raise typer.Exit(130) from error

    return wrapper


def _check_finite(options: dict[str, Any]) -> None:
    """NaN passes every comparison that an option's range is checked by."""
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise PivotTraceError(
                f"--{name.replace('_', '-')} is {value}, but must be a finite number."
            )


@contextmanager
def _torn_ledgers_told() -> Iterator[None]:
    """A torn ledger is told in one line, however often the verb reads it."""
    seen: set[str] = set()
    with warnings.catch_warnings():
        otherwise = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
            if not issubclass(category, TornLedgerWarning):
                otherwise(message, category, *rest, **more)
            elif str(message) not in seen:
                seen.add(str(message))
                complain(str(message), "warning")

        warnings.showwarning = show  # type: ignore[assignment]
        yield


def run_app(app: typer.Typer) -> None:
    """Run the command line and leave the process with its exit status; 2 for a wrong one."""
    for stream in (sys.stdout, sys.stderr):
        # A prompt may hold what the terminal's encoding cannot show.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        status = app(prog_name="pivottrace", standalone_mode=False)
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            command = error.ctx.command_path if error.ctx else "pivottrace"
            complain(f"{error.format_message().rstrip('.')}; see `{command} --help`.")
        sys.exit(2)
    sys.exit(status)


def opened(path: Path, stack: ExitStack) -> RunDir:
    """Open a run directory and hold its lock until the stack closes."""
    run = RunDir.open(path)
    stack.enter_context(run.lock())
    return run
