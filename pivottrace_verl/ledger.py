"""Ledger: every label that was bought, append only.

Contract: one JSON object a line: pt_id, label, annotator, time, source_file, cost, purpose, and
since rounds exist: round, plan, annotations. A batch is appended whole or not at all. A line that a
crash tore is left in the file, reported (`torn`) and not counted. The first label of a prompt
stands; a correction is not an entry.

A round is the labels that were bought under one plan: `round` is 1 for the probes, which come
before any plan, and for the first plan's labels, and counts on with each later plan under which
labels were bought. Lines without it are of round 1.
"""

import fcntl
import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.files import fingerprint, os_reason

PURPOSES = ("probe", "annotate")
FIELDS = ("pt_id", "label", "annotator", "time", "source_file", "cost", "purpose")
OPTIONAL = ("round", "plan", "annotations")
"""round: see above. plan: fingerprint of the plan the label was bought under, None before there is
one. annotations: [{annotator, label, cost}] where the label comes of several annotators; `cost` is
then the sum of theirs and `annotator` all their names."""


class TornLedgerWarning(UserWarning):
    """A line of the ledger is not complete; its label is not counted."""


def _may_be_torn(line: bytes) -> bool:
    """Whether a killed write may have left it: the start of an entry, or zeros."""
    start = f'{{"{FIELDS[0]}": '.encode()
    return line.startswith(start) or start.startswith(line) or not line.strip(b"\0")


def _fault(entry: Any) -> str | None:
    """What keeps it from being an entry, as half a sentence."""
    if not isinstance(entry, dict):
        return "it is no JSON object"
    missing = [name for name in FIELDS if name not in entry]
    if missing:
        return f"it has no {', '.join(missing)}"
    for name in FIELDS:
        if name != "cost" and not isinstance(entry[name], str):
            return f"its {name} is not text"
    if entry["purpose"] not in PURPOSES:
        return f"its purpose is '{entry['purpose']}', not one of {', '.join(PURPOSES)}"
    cost = entry["cost"]
    if isinstance(cost, bool) or not isinstance(cost, (int, float)):
        return "its cost is not a number"
    if not 0 <= cost < math.inf:
        return f"its cost is {cost}"
    number, plan = entry.get("round", 1), entry.get("plan")
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        return "its round is not a number from 1"
    if not (plan is None or isinstance(plan, str)):
        return "its plan is not text"
    parts = entry.get("annotations", [])
    if not isinstance(parts, list) or not all(map(_is_annotation, parts)):
        return "its annotations are no list of annotator, label and cost"
    return None


def _is_annotation(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    cost = part.get("cost")
    return (
        isinstance(part.get("annotator"), str)
        and isinstance(part.get("label"), str)
        and isinstance(cost, (int, float))
        and 0 <= cost < math.inf
    )


class Ledger:
    """The labels of one run directory; a missing file is an empty ledger."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.torn: list[int] = []
        """Numbers of the lines, from 1, that could not be read; known after a read."""
        self._read: tuple[tuple[int, int, int], list[dict[str, Any]]] | None = None

    def entries(self) -> list[dict[str, Any]]:
        """All complete lines, oldest first. Torn ones are told by a TornLedgerWarning.

        A file that has not changed since this object read it last is not read again.
        """
        try:
            stat = self.path.stat()
            state = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if self._read is None or self._read[0] != state:
                self._read = (state, self._parse(self.path.read_bytes()))
        except FileNotFoundError:
            self._read, self.torn = None, []
            return []
        except OSError as error:
            raise PivotTraceError(f"{self.path} cannot be read: {os_reason(error)}.") from error
        if self.torn:
            warnings.warn(
                f"{self.path}: {len(self.torn)} incomplete line(s), as a killed run leaves them, "
                f"are not counted (first: line {self.torn[0]}); import that label file again.",
                TornLedgerWarning,
                stacklevel=2,
            )
        return list(self._read[1])

    def _parse(self, content: bytes) -> list[dict[str, Any]]:
        entries, torn = [], []
        for number, line in enumerate(content.split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                entry = None
                if _may_be_torn(line):
                    torn.append(number)
                    continue
            if fault := _fault(entry):
                raise PivotTraceError(
                    f"Line {number} of {self.path} is not a ledger entry: {fault}."
                )
            entries.append(entry)
        self.torn = torn
        return entries

    def labels(self, purpose: str | None = None) -> dict[str, str]:
        """pt_id -> label, of all labels or of those bought for `purpose`."""
        out: dict[str, str] = {}
        for entry in self.entries():
            if purpose is None or entry["purpose"] == purpose:
                out.setdefault(entry["pt_id"], entry["label"])
        return out

    def purposes(self) -> dict[str, str]:
        """pt_id -> what its label was bought for."""
        out: dict[str, str] = {}
        for entry in self.entries():
            out.setdefault(entry["pt_id"], entry["purpose"])
        return out

    def spent(self) -> float:
        """Sum of the costs of all entries."""
        return float(sum(entry["cost"] for entry in self.entries()))

    def round_of(self, plan: str | None) -> int:
        """The round of labels that are bought now, under the plan of that fingerprint."""
        seen = [entry.get("plan") for entry in self.entries()]
        plans = list(dict.fromkeys(p for p in [*seen, plan] if isinstance(p, str)))
        return plans.index(plan) + 1 if plan is not None else max(1, len(plans))

    def fingerprint(self) -> str:
        """Of the labels and their purposes, whenever and by whom they were bought."""
        return fingerprint([sorted(self.labels().items()), sorted(self.purposes().items())])

    def append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Add a batch: `time` is filled in where it is missing, cost and round are 1 unless given.

        Raises PivotTraceError, with the file as it was, if an entry is incomplete, a prompt is
        there twice or has a label already, or the batch cannot be written in full.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        batch = [{"time": now, "cost": 1.0, "round": 1, **entry} for entry in entries]
        if not batch:
            return
        self._check(batch)
        lines = "".join(
            json.dumps(
                {f: entry[f] for f in (*FIELDS, *OPTIONAL) if f in entry},
                ensure_ascii=False,
                allow_nan=False,
            )
            + "\n"
            for entry in batch
        ).encode(errors="backslashreplace")  # Of a path that is not UTF-8: JSON's own escape.
        try:
            self._write(batch, lines)
        except OSError as error:
            raise PivotTraceError(
                f"{self.path} cannot be written: {os_reason(error)}; no label was added."
            ) from error

    def _check(self, batch: list[dict[str, Any]]) -> None:
        known = self.labels()
        allowed = {*FIELDS, *OPTIONAL}
        for entry in batch:
            missing = [name for name in FIELDS if name not in entry]
            if missing:
                raise PivotTraceError(f"A ledger entry has no {', '.join(missing)}.")
            unknown = sorted(set(entry) - allowed)
            if unknown:
                raise PivotTraceError(f"A ledger entry has no place for {', '.join(unknown)}.")
            if entry["purpose"] not in PURPOSES:
                raise PivotTraceError(
                    f"A label's purpose is '{entry['purpose']}', but must be one of "
                    f"{', '.join(PURPOSES)}."
                )
            if fault := _fault(entry):
                raise PivotTraceError(f"A ledger entry cannot be added: {fault}.")
            if entry["pt_id"] in known:
                raise PivotTraceError(
                    f"Prompt {entry['pt_id']} has the label '{known[entry['pt_id']]}' already; "
                    f"'{entry['label']}' was not added."
                )
            known[entry["pt_id"]] = entry["label"]

    def _write(self, batch: list[dict[str, Any]], lines: bytes) -> None:
        """One write, or none: what was written of a batch that does not fit is taken back."""
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Once more, now that nobody else can add the same label.
            self._check(batch)
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                # After a torn line: it stays, as a line of its own.
                lines = b"\n" + lines
            try:
                written = os.write(file, lines)
                while written < len(lines):
                    # The kernel stopped short: the next write says why, usually a full device.
                    written += os.write(file, lines[written:])
                os.fsync(file)
            except BaseException:
                os.ftruncate(file, size)
                raise
        finally:
            os.close(file)
