"""Import: what annotators said becomes labels in the ledger.

Contract: an import is all or nothing. Every row is looked at before the ledger is touched, and the
error names how many rows are bad and the first of each sort; `skip_bad` takes the good rows and
writes the bad ones to FILE.rejected.jsonl. Importing a file again changes nothing. A label in the
ledger stands: a different one is a conflict, reported and not added.

Several annotators of a prompt become one label by a rule (`agreement.resolve`); where it gives
none, the prompt stays open and is listed. What earlier files said of an open prompt counts with
what this one says, as if it were one file; of one annotator the last word counts. Where the prompt
has a label, that stands, whatever the rule would say of all of them now; who gave it is listed
beside who differs, and counts for the agreement.

The cost of a label is the sum over its annotations: three people who settle one prompt are paid
three times. Annotations of a prompt that has a label already, or gets none, are not booked: the
ledger counts labels, and the import that settles the prompt books all of them.

Labels beyond the plan's budget are taken and told: they exist and are paid for, throwing them away
saves nothing, and triage counts them against what is left of the budget.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pivottrace_verl.annotation import conflicts
from pivottrace_verl.annotation.agreement import agreement, check_rule
from pivottrace_verl.annotation.checks import check_labels, to_check
from pivottrace_verl.annotation.formats import format_of, read_annotations
from pivottrace_verl.annotation.formats.rows import Annotation, Fault
from pivottrace_verl.annotation.results import Check, ImportResult
from pivottrace_verl.annotation.settling import Outcome, bill, by_prompt, said_before
from pivottrace_verl.answers import get_answers
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.files import remove_leftovers, write_bytes_atomic
from pivottrace_verl.ledger import PURPOSES, Ledger
from pivottrace_verl.pool import RunDir


def import_labels(
    run: RunDir,
    path: str | Path,
    annotator: str,
    purpose: str | None = None,
    cost: float = 1.0,
    *,
    file_format: str | None = None,
    rule: str = "majority",
    check: str = "all",
    skip_bad: bool = False,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> ImportResult:
    """Add the file's labels to the ledger.

    Of a table only `pt_id`, `label`, `annotator` and `cost` are read; the arguments `annotator`
    and `cost` stand in where the file says nothing. `purpose` None: `probe` for the prompts of
    probes.json, `annotate` for all others. `check`: whether `all` labels are read by the run's
    answers kind, `none`, or `sample:N` of them, drawn by `seed`. `say` is told what takes long.

    Raises PivotTraceError, with the ledger as it was, if the file is unreadable or lacks a column,
    an option is unknown, or, without `skip_bad`, if a row is malformed, names a prompt that is not
    in the pool, holds a label that the run's answers kind cannot parse (of those checked), or if
    an annotator gives a prompt two different labels. With `skip_bad` the first of those stands.
    """
    path = Path(path)
    _check_options(purpose, cost, rule)
    kind_name = run.manifest["answers"]["kind"]
    kind = get_answers(kind_name)
    ledger = run.ledger()
    bought = ledger.labels()

    malformed: list[Fault] | None = [] if skip_bad else None
    rows = read_annotations(path, format_of(path, file_format), malformed)
    pool = {prompt.pt_id for prompt in run.pool()}
    known = [row for row in rows if row.pt_id in pool]
    unknown = [Fault(r.where, repr(r.pt_id[:100]), r.raw) for r in rows if r.pt_id not in pool]
    labelled = [row for row in known if row.label != ""]
    # What stands in the ledger was checked when it came in.
    new = (row.label for row in labelled if bought.get(row.pt_id) != row.label)
    unreadable, checked = _checked(kind_name, [x for x in new if x is not None], check, seed, say)
    good = [row for row in labelled if row.label is not None and row.label not in unreadable]
    prompts, repeated, contradicting = by_prompt(good, annotator, cost, kind)

    faults = {
        "rows are malformed": malformed or [],
        "rows name prompts that are not in this pool": unknown,
        f"labels cannot be read as {kind_name} answers": [
            Fault(row.where, repr(_shown(row)), row.raw)
            for row in labelled
            if row.label is None or row.label in unreadable
        ],
        "prompts have two different labels": contradicting,
    }
    rejected = sum(map(len, faults.values()))
    rejected_file = path.with_name(path.name + ".rejected.jsonl") if rejected else None
    if rejected and not skip_bad:
        raise PivotTraceError(_refusal(path, faults, checked))
    if rejected_file is not None:
        _write_rejected(rejected_file, faults)

    # All that is read is read before the ledger is touched.
    kept = conflicts.read_all(run)
    budget = _budget(run)
    plan = run.stage_fingerprint("plan") if (run.path / "plan.parquet").exists() else None
    probes = set(run.probes()["pt_ids"]) if (run.path / "probes.json").exists() else set()
    now = ledger.round_of(plan)
    before = said_before(ledger, kept, str(path))
    outcome = Outcome()
    entries = []
    for pt_id, said in prompts.items():
        earlier = before.get(pt_id, {})
        label = outcome.settle(pt_id, said, earlier, bought.get(pt_id), kind, rule)
        if label is not None:
            aim = purpose or ("probe" if pt_id in probes else "annotate")
            where = {"source_file": str(path), "purpose": aim, "round": now, "plan": plan}
            paid = bill({**earlier, **said})
            entries.append({"pt_id": pt_id, "label": label, **paid, **where})
    ledger.append(entries)
    conflicts.replace(run, kept, str(path), outcome.open)
    return ImportResult(
        added=len(entries),
        already=outcome.already + repeated,
        empty=sum(row.label == "" and not row.skipped for row in known),
        conflicts=outcome.conflicts,
        skipped=sum(row.skipped for row in known),
        disputes=outcome.disputes,
        agreement=agreement(outcome.answers, kind),
        rejected=rejected,
        rejected_file=None if rejected_file is None else str(rejected_file),
        cost=float(sum(entry["cost"] for entry in entries)),
        round=now,
        check=checked,
        over_budget=_over_budget(budget, ledger),
    )


def _check_options(purpose: str | None, cost: float, rule: str) -> None:
    if purpose is not None and purpose not in PURPOSES:
        raise PivotTraceError(
            f"A label's purpose is '{purpose}', but must be one of {', '.join(PURPOSES)}."
        )
    if not (math.isfinite(cost) and cost >= 0):
        raise PivotTraceError(f"The cost of a label is {cost}, but must not be negative.")
    check_rule(rule)


def _checked(
    kind_name: str, labels: list[str], mode: str, seed: int, say: Callable[[str], None]
) -> tuple[set[str], Check]:
    """The labels found to be unreadable, and how they were looked for."""
    distinct = list(dict.fromkeys(labels))
    asked = to_check(mode, distinct, seed)
    if asked:
        say(f"Checking {len(asked)} of {len(distinct)} different labels as {kind_name} answers.")
    good = check_labels(kind_name, asked)
    unreadable = {label for label, fine in zip(asked, good, strict=True) if not fine}
    return unreadable, Check(mode, len(distinct), len(asked), len(unreadable))


def _shown(row: Annotation) -> Any:
    """What the row has for a label, as the file says it."""
    if row.label is not None:
        return row.label
    return row.raw.get("label") if isinstance(row.raw, dict) else None


def _refusal(path: Path, faults: Mapping[str, list[Fault]], checked: Check) -> str:
    said = [
        f"{len(found)} {what} (first: {found[0].where}: {found[0].reason})"
        for what, found in faults.items()
        if found
    ]
    if checked.failed and checked.mode != "all":
        said.append(
            f"{checked.failed} of {checked.checked} labels in the sample failed, so about "
            f"{checked.estimate():.0f} of {checked.distinct} will"
        )
    return f"{path} was not imported: {'; '.join(said)}."


def _write_rejected(path: Path, faults: Mapping[str, list[Fault]]) -> None:
    lines = [
        {"where": fault.where, "reason": what, "detail": fault.reason, "row": fault.raw}
        for what, found in faults.items()
        for fault in found
    ]
    remove_leftovers(path.parent, path.name)
    # ASCII and text for what JSON does not know: a bad row may hold anything.
    write_bytes_atomic(path, "".join(json.dumps(x, default=str) + "\n" for x in lines).encode())


def _budget(run: RunDir) -> dict[str, Any]:
    """The plan's `budget` in labels and `budget_cost`; empty without a plan."""
    found = run.triage().get("labels") if (run.path / "triage.json").exists() else None
    return found if isinstance(found, dict) else {}


def _over_budget(budget: Mapping[str, Any], ledger: Ledger) -> str | None:
    labels, cost = budget.get("budget"), budget.get("budget_cost")
    if labels is not None and (count := len(ledger.labels())) > labels:
        return f"{count} labels are bought, {count - labels} more than the plan's budget."
    if cost is not None and (spent := ledger.spent()) > cost:
        return f"The labels cost {spent:g}, but the plan's budget is {cost:g}."
    return None
