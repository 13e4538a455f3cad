"""The queue: prompts out to an annotator, labels back in.

Contract: an import is all or nothing. Every row of the file is checked before the ledger is
touched, and the error names how many rows are bad and the first of each sort. Importing a file
again changes nothing. A label in the ledger stands: a different one is a conflict, reported and
not added.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pivottrace_verl.annotation.tables import check_suffix, read_rows, write_rows
from pivottrace_verl.answers import get_answers
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.ledger import PURPOSES
from pivottrace_verl.pool import RunDir
from pivottrace_verl.prompts import render

COLUMNS = ("pt_id", "prompt", "data_source", "uncertainty", "majority", "label")


@dataclass(frozen=True)
class ImportResult:
    """What an import did."""

    added: int
    """Labels new in the ledger."""
    already: int
    """Labels that mean what the ledger has for the prompt already."""
    empty: int
    """Rows without a label yet."""
    conflicts: list[tuple[str, str, str]] = field(default_factory=list)
    """(pt_id, label in the ledger, label in the file): the ledger's stands."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def sentence(self) -> str:
        """What a person wants to know."""
        text = (
            f"{self.added} labels added, {self.already} were in the ledger already, {self.empty} "
            "prompts have no label yet"
        )
        if self.conflicts:
            pt_id, before, now = self.conflicts[0]
            text += (
                f"; {len(self.conflicts)} labels differ from the ledger's, which stand (first: "
                f"{pt_id} has '{before}', the file says '{now}')"
            )
        return text + "."


def export_queue(run: RunDir, pt_ids: Sequence[str], path: str | Path) -> int:
    """Write the prompts, in the order given, with an empty `label`; returns their number.

    `prompt` is rendered text, `uncertainty` the plan's if there is a plan, `majority` the
    policy's own vote if there are scores. Raises PivotTraceError for ids that are not in the pool
    or there twice, and if a file of that name holds labels that the ledger does not.
    """
    path = Path(path)
    check_suffix(path)
    prompts = {prompt.pt_id: prompt for prompt in run.pool()}
    unknown = [pt_id for pt_id in pt_ids if pt_id not in prompts]
    if unknown:
        raise PivotTraceError(
            f"{len(unknown)} prompts to annotate are not in the pool (first: {unknown[0]})."
        )
    if len(set(pt_ids)) != len(pt_ids):
        raise PivotTraceError("A prompt is in the list to annotate more than once.")
    _keep_work(run, path)
    uncertainty: dict[str, float] = {}
    majority: dict[str, str | None] = {}
    if (run.path / "scores.parquet").exists():
        scores = run.scores().select(["pt_id", "majority"]).to_pylist()
        majority = {row["pt_id"]: row["majority"] for row in scores}
        if (run.path / "plan.parquet").exists():
            plan = run.plan().select(["pt_id", "uncertainty"]).to_pylist()
            uncertainty = {row["pt_id"]: row["uncertainty"] for row in plan}
    rows = [
        {
            "pt_id": pt_id,
            "prompt": render(prompts[pt_id].messages),
            "data_source": prompts[pt_id].data_source,
            "uncertainty": uncertainty.get(pt_id),
            "majority": majority.get(pt_id),
            "label": "",
        }
        for pt_id in pt_ids
    ]
    write_rows(path, rows, COLUMNS)
    return len(rows)


def _keep_work(run: RunDir, path: Path) -> None:
    """Refuse to replace a queue file whose labels were never imported."""
    if not path.exists():
        return
    bought = run.ledger().labels()
    waiting = [
        row["pt_id"]
        for _, row in read_rows(path, ("pt_id", "label"))
        if str(row["label"] or "").strip() and row["pt_id"] not in bought
    ]
    if waiting:
        raise PivotTraceError(
            f"{path} already holds {len(waiting)} labels that are not imported (first: "
            f"{waiting[0]}): import that file, or export under another name."
        )


def import_labels(
    run: RunDir,
    path: str | Path,
    annotator: str,
    purpose: str | None = None,
    cost: float = 1.0,
) -> ImportResult:
    """Add the file's labels to the ledger; only `pt_id` and `label` are read.

    `purpose` None: `probe` for the prompts of probes.json, `annotate` for all others.

    Raises PivotTraceError, with the ledger as it was, if the file is unreadable, lacks a column,
    names prompts that are not in the pool, holds labels that the run's answers kind cannot parse,
    or two different labels for one prompt.
    """
    path = Path(path)
    if purpose is not None and purpose not in PURPOSES:
        raise PivotTraceError(
            f"A label's purpose is '{purpose}', but must be one of {', '.join(PURPOSES)}."
        )
    if not cost >= 0 or cost == float("inf"):
        raise PivotTraceError(f"The cost of a label is {cost}, but must not be negative.")
    kind = get_answers(run.manifest["answers"]["kind"])
    pool = {prompt.pt_id for prompt in run.pool()}
    bought = run.ledger().labels()
    new: dict[str, str] = {}
    unknown: list[str] = []
    unparseable: list[str] = []
    contradicting: list[str] = []
    conflicts: list[tuple[str, str, str]] = []
    already = empty = 0
    for line, row in read_rows(path, ("pt_id", "label")):
        pt_id, label = row["pt_id"], _label(row["label"])
        if pt_id not in pool:
            unknown.append(f"line {line}: '{pt_id[:100]}'")
        elif label == "":
            empty += 1
        elif label is None or kind.canonical(label) is None:
            unparseable.append(f"line {line}: {row['label']!r}")
        elif pt_id in bought:
            if kind.equal(label, bought[pt_id]):
                already += 1
            else:
                conflicts.append((pt_id, bought[pt_id], label))
        elif pt_id in new:
            if kind.equal(label, new[pt_id]):
                already += 1
            else:
                contradicting.append(f"line {line}: '{label}' after '{new[pt_id]}'")
        else:
            new[pt_id] = label
    faults = [
        f"{len(found)} {what} (first: {found[0]})"
        for what, found in (
            ("rows name prompts that are not in this pool", unknown),
            (f"labels cannot be read as {run.manifest['answers']['kind']} answers", unparseable),
            ("prompts have two different labels", contradicting),
        )
        if found
    ]
    if faults:
        raise PivotTraceError(f"{path} was not imported: {'; '.join(faults)}.")
    probes = set(run.probes()["pt_ids"]) if (run.path / "probes.json").exists() else set()
    run.ledger().append(
        {
            "pt_id": pt_id,
            "label": label,
            "annotator": annotator,
            "source_file": str(path),
            "cost": cost,
            "purpose": purpose or ("probe" if pt_id in probes else "annotate"),
        }
        for pt_id, label in new.items()
    )
    return ImportResult(added=len(new), already=already, empty=empty, conflicts=conflicts)


def _label(value: Any) -> str | None:
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
