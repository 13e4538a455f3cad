"""Whether labels can be read at all: all of them, a sample, or none.

Contract: a mode is `all`, `sample:N` or `none`; the sample is drawn by seed from the distinct
labels, so the same file gives the same sample.
"""

import random
from collections.abc import Sequence

from pivottrace_verl.answers import canonical_many
from pivottrace_verl.errors import PivotTraceError

MODES = "all, sample:N or none"


def check_labels(kind_name: str, labels: Sequence[str]) -> list[bool]:
    """[N] whether each label can be read as an answer of that kind, within the limits of the
    answers' worker processes: what times out cannot be compared either.

    PivotTraceError if the kind is unknown or breaks.
    """
    return [isinstance(form, str) for form in canonical_many(kind_name, labels)]


def to_check(mode: str, labels: Sequence[str], seed: int = 0) -> list[str]:
    """Which of the distinct labels a mode checks. PivotTraceError if there is no such mode."""
    if mode == "all":
        return list(labels)
    if mode == "none":
        return []
    name, _, number = mode.partition(":")
    if name != "sample" or not number.isdecimal() or int(number) < 1:
        raise PivotTraceError(f"The check is '{mode}', but must be {MODES}.")
    return random.Random(seed).sample(labels, min(int(number), len(labels)))
