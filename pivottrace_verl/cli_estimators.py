"""`pivottrace estimators`: how well each estimator tells where the policy fails; what to use."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from pivottrace_verl import ui
from pivottrace_verl.cli_base import (
    AsJson,
    MaxTruncated,
    MaxUnanswered,
    RunPath,
    Seed,
    opened,
    told,
)
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.files import write_bytes_atomic
from pivottrace_verl.pool import RunDir

if TYPE_CHECKING:
    from pivottrace_verl.calibration import Outcome


@told
def estimators(
    run: RunPath,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw points and intervals into this SVG file.")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Bootstrap draws of the probes.")] = 1000,
    max_unanswered: MaxUnanswered = 0.5,
    max_truncated: MaxTruncated = 0.5,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Judge every estimator on the labelled probes, with intervals, and recommend one."""
    from pivottrace_verl.estimator_report import assess, cost_per_prompt
    from pivottrace_verl.fitted import MANY
    from pivottrace_verl.report.estimator_picture import picture as drawn
    from pivottrace_verl.score_columns import estimators_in
    from pivottrace_verl.triage import FEWEST_PROBES, TriageConfig, judged, too_few

    config = TriageConfig(max_unanswered=max_unanswered, max_truncated=max_truncated)
    if picture is not None and picture.suffix.lower() != ".svg":
        raise PivotTraceError(f"The picture is drawn as SVG, so {picture} must end in .svg.")
    with ExitStack() as stack:
        opened_run = opened(run, stack)
        scores = opened_run.scores(rollouts=False)
        labelled = _labelled_probes(opened_run, scores)
        found = judged(scores, labelled, config)
        set_apart = len(labelled) - len(found)
        if len(found) < FEWEST_PROBES:
            raise too_few(len(found), set_apart)
        costs = cost_per_prompt(opened_run.manifest, estimators_in(scores))
        # With few probes it takes a second or two.
        bar = None if as_json or len(found) < MANY else stack.enter_context(ui.Bar("bootstrap"))
        report = assess(
            scores,
            found,
            config,
            draws=draws,
            seed=seed,
            costs=costs,
            progress=None if bar is None else bar.update,
        )
    report["probes_in_review"] = set_apart
    if picture is not None:
        write_bytes_atomic(picture, drawn(report))
    if as_json:
        ui.print_json(report)
        return
    ui.console.print(_table(report))
    random_order = report["random_order"]
    ui.say(
        f"A random order: AUROC 0.5, Spearman 0, AURC {random_order['aurc']:.2f}. AURC, the area "
        "under the risk-coverage curve: share of wrong majorities among the k surest prompts, mean "
        "over all k; lower is better. Every score is read in the direction the probes give it: "
        "+ higher is more uncertain, - lower is. Cost: seconds a prompt, rollouts included."
    )
    if set_apart:
        ui.say(
            f"{set_apart} labelled probes are left out: their rollouts are broken, which triage "
            "sets apart for review."
        )
    for sentence in [*report["not_offered"].values(), *report["sentences"]]:
        ui.say(sentence)


def _labelled_probes(run: RunDir, scores: Any) -> list[Outcome]:
    """Outcomes of the probes whose label is there already."""
    from pivottrace_verl.triage import FEWEST_PROBES, outcomes

    drawn = set(run.probes()["pt_ids"])
    labels = {pt_id: label for pt_id, label in run.ledger().labels().items() if pt_id in drawn}
    if len(labels) < FEWEST_PROBES:
        raise PivotTraceError(
            f"Only {len(labels)} of the {len(drawn)} probes have a label, but at least "
            f"{FEWEST_PROBES} are needed to judge an estimator: run `pivottrace annotate export "
            "--what probes`, have the file filled, and import it."
        )
    return outcomes(scores, labels, run.manifest["answers"]["kind"])


def _table(report: Mapping[str, Any]) -> Table:
    """At most 100 columns wide: names of up to 27 letters, up to 9,999 probes."""
    level = report["bootstrap"]["level"]
    out = Table(
        title=f"Estimators on {report['probes']} probes, {report['wrong_majorities']} with a wrong "
        f"majority: point [{level:.0%} interval]",
        title_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for column in ("", "estimator", "n", "AUROC", "within length", "Spearman", "AURC", "cost s"):
        out.add_column(column, no_wrap=True)
    for row in report["estimators"]:
        seconds = row["seconds_per_prompt"]
        cells = [
            {"higher": "+", "lower": "-"}.get(row["direction"], ""),
            row["estimator"],
            str(row["n"]),
            _interval(row["auroc"]) if row["measured"] else "not scored",
            _interval(row["auroc_within_length"]),
            _interval(row["spearman"]),
            _interval(row["aurc"]),
            "-" if seconds is None else f"{seconds:.2g}",
        ]
        out.add_row(*(Text(cell) for cell in cells))
    return out


def _interval(value: Mapping[str, float | None]) -> str:
    """`.84 [.74,.92]`: without the zero before the point, for narrow terminals."""
    if value["point"] is None:
        return "-"
    return f"{_short(value['point'])} [{_short(value['low'])},{_short(value['high'])}]"


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 0.995 else f"{value:.1f}"
