"""`pivottrace annotate`: prompts out to annotators as a file, labels back into the ledger."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from pivottrace_verl import ui
from pivottrace_verl.cli_base import AsJson, RunPath, opened, told
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.pool import RunDir

annotate_app = typer.Typer(help="Hand prompts to annotators and take labels back.")


@annotate_app.command("export")
@told
def annotate_export(
    run: RunPath,
    file: Annotated[Path, typer.Argument(help="JSONL or CSV, by its suffix.")],
    what: Annotated[str, typer.Option(help="probes, or queue: what triage wants.")] = "queue",
) -> None:
    """Write the prompts that wait for a label, most uncertain first."""
    from pivottrace_verl.annotation import export_queue

    with ExitStack() as stack:
        opened_run = opened(run, stack)
        count = export_queue(opened_run, _waiting(opened_run, what), file)
    ui.say(f"{count} prompts written to {file}; fill in `label` and import the file.")


def _waiting(run: RunDir, what: str) -> list[str]:
    labeled = run.ledger().labels()
    if what == "probes":
        wanted = run.probes()["pt_ids"]
    elif what == "queue":
        rows = [row for row in run.plan().to_pylist() if row["route"] == "annotate"]
        wanted = [row["pt_id"] for row in sorted(rows, key=lambda row: row["rank"])]
    else:
        raise PivotTraceError(f"--what must be probes or queue, not {what!r}.")
    return [pt_id for pt_id in wanted if pt_id not in labeled]


@annotate_app.command("import")
@told
def annotate_import(
    run: RunPath,
    file: Annotated[Path, typer.Argument(help="The file an annotator filled.")],
    annotator: Annotated[str, typer.Option(help="Who labelled.")] = "annotator",
    purpose: Annotated[
        str | None, typer.Option(help="probe or annotate; default: probe for the probes drawn.")
    ] = None,
    cost: Annotated[float, typer.Option(help="Cost a label, in your unit.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Check a filled file and buy its labels through the ledger: all of them or none."""
    from pivottrace_verl.annotation import import_labels

    with ExitStack() as stack:
        opened_run = opened(run, stack)
        result = import_labels(opened_run, file, annotator, purpose, cost=cost)
    if as_json:
        ui.print_json(result.to_dict())
    else:
        ui.say(result.sentence())


@annotate_app.command("fill")
@told
def annotate_fill(
    file: Annotated[Path, typer.Argument(help="An exported queue.")],
    out: Annotated[Path, typer.Argument(help="The filled file to write.")],
    answers: Annotated[Path, typer.Option(help="JSONL of pt_id and label.")],
) -> None:
    """Fill a queue from a file of known answers, as an annotator would: for experiments."""
    from pivottrace_verl.annotation.oracle import fill

    ui.say(f"{fill(file, answers, out)} labels filled into {out}.")
