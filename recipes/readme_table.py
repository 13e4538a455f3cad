"""Puts tables made from a recipe's committed summary.json into a README, between two comments.

Contract: the README changes between `<!-- NAME: ... -->` and `<!-- /NAME -->` only.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pivottrace_verl.files import write_bytes_atomic

Tables = Callable[[dict[str, Any]], str]
"""A run's summary -> Markdown."""
Picture = Callable[[dict[str, Any]], bytes]
"""A run's summary -> an SVG file."""


def filled(text: str, name: str, made: str) -> str:
    """The README's text with `made` between the comments; SystemExit if they are not there."""
    pattern = f"(<!-- {re.escape(name)}:[^\n]*\n).*?(<!-- /{re.escape(name)} -->)"
    new, found = re.subn(pattern, lambda m: f"{m[1]}{made}\n{m[2]}", text, flags=re.DOTALL)
    if not found:
        raise SystemExit(f"error: the README has no part <!-- {name}: ... <!-- /{name} -->.")
    return new


def digits(value: float | None) -> str:
    """Two digits after the point; a dash where there is no number."""
    return "-" if value is None else f"{value:.2f}"


def command_line(
    doc: str,
    tables: Tables,
    *,
    result: Path,
    readme: Path,
    name: str,
    argv: list[str] | None,
    picture: tuple[str, Picture] | None = None,
) -> None:
    """Print the tables, or --write them into the README; --take takes over a run's result first.

    A `picture`, (file name, how it is drawn), is written beside the result when the README is.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--take", type=Path, metavar="RUN")
    args = parser.parse_args(argv)
    if args.take:
        result.parent.mkdir(exist_ok=True)
        shutil.copy(args.take / "summary.json", result)
    summary = json.loads(result.read_text())
    made = tables(summary)
    if args.write:
        if picture:
            write_bytes_atomic(result.with_name(picture[0]), picture[1](summary))
        readme.write_text(filled(readme.read_text(), name, made))
    else:
        print(made)
