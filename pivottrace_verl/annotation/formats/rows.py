"""What every format has in common: an annotation that came back, and a row that is bad.

Contract: a reader gives each row of its file exactly once, as an `Annotation` or as a `Fault`. A
label is text; "" where there is none yet, None where the cell holds nothing a label could be.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pivottrace_verl.errors import PivotTraceError

UNSURE = ("unsure", "skipped")
"""Words in place of a label: the annotator passed the prompt on. Compared without case."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A row that cannot be taken."""

    where: str
    """`line 3`, `row 3`, `task 17, annotation 2`, `record 3`."""
    reason: str
    """What is wrong with it, as the rest of a sentence that begins with where it is."""
    raw: Any = None
    """The row as it stands in the file, if it could be read at all."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """What one annotator said about one prompt."""

    where: str
    pt_id: str
    label: str | None
    annotator: str | None = None
    """None: the file does not say."""
    cost: float | None = None
    """None: the file does not say."""
    skipped: bool = False
    """The annotator looked and gave no label."""
    raw: Any = None


def report(path: Path, faults: list[Fault] | None, fault: Fault) -> None:
    """Collect the fault, or raise it as a PivotTraceError if nobody collects."""
    if faults is None:
        raise PivotTraceError(
            f"{fault.where[0].upper()}{fault.where[1:]} of {path} {fault.reason}."
        )
    faults.append(fault)


def label_text(value: Any) -> str | None:
    """The label as text, "" if there is none yet, None if it is nothing a label could be."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None
    text = str(value).strip()
    try:
        text.encode()
    except UnicodeEncodeError:
        # Half a surrogate pair: no file could hold it.
        return None
    return text


def _cost(value: Any) -> float | None:
    """The cost in a cell, None if it is empty. ValueError if it is no finite number >= 0."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError
    try:
        cost = float(value)
    except OverflowError as error:
        raise ValueError from error
    if not (math.isfinite(cost) and cost >= 0):
        raise ValueError
    return cost


def annotation(
    where: str, pt_id: str, label: Any, annotator: Any, cost: Any, raw: Any
) -> Annotation | Fault:
    """The values of one row, as the file has them; the words `UNSURE` are a skip."""
    try:
        price = _cost(cost)
    except ValueError:
        reason = f"has the cost {cost!r}, but a cost is a number of at least 0"
        return Fault(where, reason, raw)
    text = label_text(label)
    skipped = text is not None and text.lower() in UNSURE
    name = label_text(annotator)
    return Annotation(where, pt_id, "" if skipped else text, name or None, price, skipped, raw)


def take(
    path: Path, out: list[Annotation], faults: list[Fault] | None, found: Annotation | Fault
) -> None:
    """Put what was found where it belongs; a fault is raised if nobody collects them."""
    if isinstance(found, Fault):
        report(path, faults, found)
    else:
        out.append(found)


def from_table(
    path: Path, rows: list[tuple[str, dict[str, Any]]], faults: list[Fault] | None
) -> list[Annotation]:
    """(where, row) of a table -> annotations: `pt_id`, `label`; `annotator`, `cost` if there."""
    out: list[Annotation] = []
    for where, row in rows:
        who, cost = row.get("annotator"), row.get("cost")
        take(path, out, faults, annotation(where, row["pt_id"], row["label"], who, cost, row))
    return out
