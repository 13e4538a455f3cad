"""Ledger: every label that was bought, append only.

Contract: one JSON object a line: pt_id, label, annotator, time, source_file, cost, purpose. A
batch is appended whole or not at all. A line that a crash tore is left in the file, reported
(`torn`) and not counted. The first label of a prompt stands.
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
    return None if 0 <= cost < math.inf else f"its cost is {cost}"


class Ledger:
    """The labels of one run directory; a missing file is an empty ledger."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.torn: list[int] = []
        """Numbers of the lines, from 1, that could not be read; known after a read."""

    def entries(self) -> list[dict[str, Any]]:
        """All complete lines, oldest first. Torn ones are told by a TornLedgerWarning."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            self.torn = []
            return []
        except OSError as error:
            raise PivotTraceError(f"{self.path} cannot be read: {os_reason(error)}.") from error
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
        if torn:
            warnings.warn(
                f"{self.path}: {len(torn)} incomplete line(s), as a killed run leaves them, are "
                f"not counted (first: line {torn[0]}); import that label file again.",
                TornLedgerWarning,
                stacklevel=2,
            )
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

    def fingerprint(self) -> str:
        """Of the labels and their purposes, whenever and by whom they were bought."""
        return fingerprint([sorted(self.labels().items()), sorted(self.purposes().items())])

    def append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Add a batch: `time` is filled in where it is missing, cost is 1 unless given.

        Raises PivotTraceError, with the file as it was, if an entry is incomplete, a prompt is
        there twice or has a label already, or the batch cannot be written in full.
        """
        now = datetime.now(UTC).isoformat(timespec="seconds")
        batch = [{"time": now, "cost": 1.0, **entry} for entry in entries]
        if not batch:
            return
        self._check(batch)
        lines = "".join(
            json.dumps({f: entry[f] for f in FIELDS}, ensure_ascii=False, allow_nan=False) + "\n"
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
        for entry in batch:
            missing = [name for name in FIELDS if name not in entry]
            if missing:
                raise PivotTraceError(f"A ledger entry has no {', '.join(missing)}.")
            unknown = sorted(set(entry) - set(FIELDS))
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
