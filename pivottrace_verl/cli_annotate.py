"""`pivottrace annotate`: prompts out to annotators, labels back into the ledger.

By file (export, import), through a running Label Studio (push, pull), and where it stands (status).
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from pivottrace_verl import ui
from pivottrace_verl.cli_base import AsJson, RunPath, opened, told
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.pool import RunDir

annotate_app = typer.Typer(help="Hand prompts to annotators and take labels back.")

What = Annotated[str, typer.Option(help="probes, or queue: what triage wants.")]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        help="jsonl, csv, parquet, label-studio or argilla; default: by the suffix (.json is "
        "Label Studio's, .argilla.json Argilla's).",
    ),
]
Annotator = Annotated[str, typer.Option(help="Who labelled, where the file does not say.")]
Purpose = Annotated[
    str | None, typer.Option(help="probe or annotate; default: probe for the probes drawn.")
]
Cost = Annotated[
    float, typer.Option(help="Cost of an annotation, in your unit, where the file does not say.")
]
Rule = Annotated[
    str,
    typer.Option(
        "--conflicts",
        help="Several annotators, different answers: majority (a tie stays open), first or "
        "unanimous.",
    ),
]
Check = Annotated[str, typer.Option(help="Labels read by the answers kind: all, sample:N or none.")]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Take good rows, write bad ones to FILE.rejected.jsonl.")
]
CheckSeed = Annotated[int, typer.Option("--seed", help="Seed of the sample that is checked.")]
Url = Annotated[
    str,
    typer.Option(
        help="Label Studio's address; the token is in the environment "
        "variable LABEL_STUDIO_API_KEY."
    ),
]
Project = Annotated[str, typer.Option(help="The project's title, or its number.")]


@annotate_app.command("export")
@told
def annotate_export(
    run: RunPath,
    file: Annotated[
        Path, typer.Argument(help=".jsonl, .csv, .parquet, .json (Label Studio), .argilla.json.")
    ],
    what: What = "queue",
    file_format: Format = None,
) -> None:
    """Write the prompts that wait for a label, most uncertain first."""
    from pivottrace_verl.annotation import export_queue, waiting

    with ExitStack() as stack:
        opened_run = opened(run, stack)
        count = export_queue(opened_run, waiting(opened_run, what), file, file_format)
    ui.say(f"{count} prompts written to {file}; have them labelled and import the file.")


@annotate_app.command("import")
@told
def annotate_import(
    run: RunPath,
    file: Annotated[Path, typer.Argument(help="The file an annotator filled.")],
    annotator: Annotator = "annotator",
    purpose: Purpose = None,
    cost: Cost = 1.0,
    file_format: Format = None,
    conflicts: Rule = "majority",
    check: Check = "all",
    skip_bad: SkipBad = False,
    seed: CheckSeed = 0,
    as_json: AsJson = False,
) -> None:
    """Check a filled file and buy its labels through the ledger: all of them or none."""
    with ExitStack() as stack:
        _import(
            opened(run, stack),
            file,
            as_json,
            annotator=annotator,
            purpose=purpose,
            cost=cost,
            file_format=file_format,
            rule=conflicts,
            check=check,
            skip_bad=skip_bad,
            seed=seed,
        )


def _import(run: RunDir, file: Path, as_json: bool, **options: Any) -> None:
    from pivottrace_verl.annotation import import_labels

    result = import_labels(run, file, say=_quiet if as_json else ui.say, **options)
    if as_json:
        ui.print_json(result.to_dict())
        return
    for sentence in result.sentences():
        ui.say(sentence)


def _quiet(_: str) -> None:
    pass


@annotate_app.command("push")
@told
def annotate_push(
    run: RunPath,
    url: Url,
    project: Project,
    what: What = "queue",
    annotators: Annotated[
        int, typer.Option(min=1, help="Annotations a task, if the project is made now.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Make tasks in a running Label Studio of the prompts that wait for a label; none twice."""
    from pivottrace_verl.annotation import waiting
    from pivottrace_verl.annotation.server import LabelStudioServer

    with ExitStack() as stack:
        opened_run = opened(run, stack)
        server = LabelStudioServer(url, project)
        progress = None if as_json else stack.enter_context(ui.Bar("push")).update
        wanted = waiting(opened_run, what)
        number, made, there = server.push(opened_run, wanted, annotators, progress)
    if as_json:
        ui.print_json({"project": number, "pushed": made, "already": there})
    else:
        ui.say(f"{made} tasks made in project {number} at {url}, {there} were there already.")


@annotate_app.command("pull")
@told
def annotate_pull(
    run: RunPath,
    url: Url,
    project: Project,
    annotator: Annotator = "annotator",
    purpose: Purpose = None,
    cost: Cost = 1.0,
    conflicts: Rule = "majority",
    check: Check = "all",
    skip_bad: SkipBad = False,
    seed: CheckSeed = 0,
    as_json: AsJson = False,
) -> None:
    """Import the finished annotations of a project in a running Label Studio."""
    from pivottrace_verl.annotation.server import LabelStudioServer

    with ExitStack() as stack:
        opened_run = opened(run, stack)
        server = LabelStudioServer(url, project)
        with ExitStack() as shown:
            progress = None if as_json else shown.enter_context(ui.Bar("pull")).update
            file, unfinished = server.pull(opened_run, progress)
        if not as_json:
            ui.say(f"{file} written; {unfinished} tasks of the project still wait for annotators.")
        _import(
            opened_run,
            file,
            as_json,
            annotator=annotator,
            purpose=purpose,
            cost=cost,
            file_format="label-studio",
            rule=conflicts,
            check=check,
            skip_bad=skip_bad,
            seed=seed,
        )


@annotate_app.command("status")
@told
def annotate_status(run: RunPath, as_json: AsJson = False) -> None:
    """What was bought, by whom, in which round, and what is open or in conflict."""
    from pivottrace_verl.annotation.status import status

    found = status(RunDir.open(run))
    if as_json:
        ui.print_json(found)
        return
    still = [
        f"{count} of the {what} wait for a label"
        for what, count in (("probes", found["open"]["probes"]), ("queue", found["open"]["queue"]))
        if count is not None
    ]
    budget = "" if found["budget"] is None else f" of a budget of {found['budget']}"
    cost = "" if found["cost"] == found["bought"] else f", cost {found['cost']:g}"
    ui.say(
        f"{found['bought']} labels bought{budget}{cost}; "
        f"{', '.join(still) or 'no probes drawn yet'}; {len(found['conflicts'])} conflicts."
    )
    if found["bought"]:
        ui.table("Rounds", found["rounds"], ["round", "labels", "probes", "cost"])
        ui.table("Annotators", found["annotators"], ["annotator", "annotations", "cost"])
    if found["conflicts"]:
        rows = [
            {**record, "said": "; ".join(f"{who}: {label}" for who, label in record["said"])}
            for record in found["conflicts"]
        ]
        ui.table("Conflicts", rows, ["pt_id", "ledger", "said", "source_file"])


@annotate_app.command("config")
@told
def annotate_config(
    tool: Annotated[str, typer.Argument(help="label-studio.")] = "label-studio",
) -> None:
    """Print the labelling configuration that an annotation tool needs for our tasks."""
    from pivottrace_verl.annotation.formats.label_studio import CONFIG

    if tool != "label-studio":
        raise PivotTraceError(f"There is a configuration for label-studio, none for '{tool}'.")
    print(CONFIG, end="")


@annotate_app.command("fill")
@told
def annotate_fill(
    file: Annotated[Path, typer.Argument(help="An exported queue: .jsonl, .csv or .parquet.")],
    out: Annotated[Path, typer.Argument(help="The filled file to write.")],
    answers: Annotated[Path, typer.Option(help="Table of pt_id and label.")],
) -> None:
    """Fill a queue from a file of known answers, as an annotator would: for experiments."""
    from pivottrace_verl.annotation.oracle import fill

    ui.say(f"{fill(file, answers, out)} labels filled into {out}.")
