"""`pivottrace probe`, `triage` and `export`: from scores to routes, and from routes to files."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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

if TYPE_CHECKING:
    from pivottrace_verl.triage import Plan

_SHOWN = (
    "estimator",
    "auroc",
    "auroc_within_length",
    "spearman",
    "p_value",
    "p_adjusted",
    "direction",
)
"""Columns of the estimator table that fit on a terminal; --json has all."""


@told
def probe(
    run: RunPath,
    n: Annotated[
        int | None, typer.Option(min=1, help="Probes; default: 2% of the pool, 64 at least.")
    ] = None,
    estimator: Annotated[str, typer.Option(help="Ranking they are spread over.")] = "pivot_density",
    seed: Seed = 0,
) -> None:
    """Choose the prompts whose labels calibrate the ranking, spread evenly over it."""
    from pivottrace_verl.planning import draw_probes

    with ExitStack() as stack:
        drawn, broken = draw_probes(opened(run, stack), estimator, n, seed)
    ui.say(
        f"{drawn} probes chosen over the ranking by {estimator}"
        + (f", {broken} prompts whose rollouts are broken left out" if broken else "")
        + f"; next: pivottrace annotate export {run} FILE --what probes"
    )


@told
def triage(
    run: RunPath,
    estimator: Annotated[
        str, typer.Option(help="Which estimator ranks the pool, or auto.")
    ] = "pivot_density",
    budget: Annotated[int | None, typer.Option(help="Labels in all, probes included.")] = None,
    budget_cost: Annotated[
        float | None,
        typer.Option(help="The budget as a sum of costs; what the ledger has spent counts."),
    ] = None,
    costs: Annotated[
        Path | None,
        typer.Option(
            help="Table of pt_id and cost, .jsonl, .csv or .parquet; a label not in it costs 1."
        ),
    ] = None,
    quota: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE=N", help="At most N labels in all from a data source; may be repeated."
        ),
    ] = None,
    floor: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE=N", help="Buy from a data source first, until it has N labels in all."
        ),
    ] = None,
    priority: Annotated[
        str,
        typer.Option(
            help="What a binding budget buys first: uncertain, threshold, cheapest or random."
        ),
    ] = "uncertain",
    overflow: Annotated[
        str, typer.Option(help="Route of what the budget leaves out: drop or self_train.")
    ] = "drop",
    mastered: Annotated[float, typer.Option(help="Pass rate from which a prompt is dropped.")] = (
        0.9
    ),
    trusted: Annotated[float, typer.Option(help="Majority accuracy that votes need.")] = 0.7,
    min_spearman: Annotated[
        float, typer.Option(help="Rank correlation with failure that a ranking needs.")
    ] = 0.1,
    alpha: Annotated[
        float, typer.Option(help="Largest p value of that correlation; 1 asks for none.")
    ] = 0.05,
    max_unanswered: MaxUnanswered = 0.5,
    max_truncated: MaxTruncated = 0.5,
    fallback: Annotated[
        bool, typer.Option(help="If the probes refuse the estimator, take the one they name.")
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="Show the plan, write nothing.")] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Calibrate the ranking on the probes and give every prompt its route."""
    from pivottrace_verl.planning import make_plan
    from pivottrace_verl.triage import TriageConfig

    config = TriageConfig(
        estimator=estimator,
        budget=budget,
        budget_cost=budget_cost,
        quotas=_per_source("--quota", quota),
        floors=_per_source("--floor", floor),
        priority=priority,
        overflow=overflow,
        mastered=mastered,
        trusted=trusted,
        min_spearman=min_spearman,
        alpha=alpha,
        max_unanswered=max_unanswered,
        max_truncated=max_truncated,
        seed=seed,
    )
    with ExitStack() as stack:
        opened_run = opened(run, stack)
        plan, info = make_plan(opened_run, config, fallback=fallback, costs=costs)
        if not dry_run:
            opened_run.write_plan(plan.rows, info)
    if as_json:
        ui.print_json(info)
        return
    if info["refused"]:
        ui.say(f"refused: {info['refused']}")
    _show(plan, run, written=not dry_run)


def _per_source(option: str, texts: list[str] | None) -> dict[str, int]:
    out: dict[str, int] = {}
    for text in texts or []:
        # A source's name may hold an equals sign.
        source, _, number = text.rpartition("=")
        try:
            n = int(number)
        except ValueError:
            n = -1
        if not source or n < 0:
            raise PivotTraceError(
                f"{option} must be SOURCE=N with a whole number of at least 0, not '{text}'."
            )
        if source in out:
            raise PivotTraceError(f"{option} names the source '{source}' twice.")
        out[source] = n
    return out


def _show(plan: Plan, run: Path, *, written: bool) -> None:
    """The plan for a person."""
    table, curve = plan.table, plan.curve
    if table:
        shown = [name for name in _SHOWN if name in table[0]]
        ui.table(f"Estimators on {table[0]['n']} probes", table, shown)
    ui.say(
        f"Ranked by {plan.estimator} ({plan.direction} is more uncertain); Spearman with the "
        f"probes' pass rate {plan.spearman:+.2f}."
    )
    ui.say(
        "On ranks u from 0 (surest) to 1: mastered up to u_low "
        f"{_threshold(curve.u_low, curve.u_low_interval)}, votes not trusted from u_high "
        f"{_threshold(curve.u_high, curve.u_high_interval)} ({curve.level:.0%} intervals: "
        f"{curve.draws} bootstrap draws of {curve.probes} probes)."
    )
    routes = plan.route_rows()
    ui.table("Routes", routes, list(routes[0]))
    if plan.sources:
        ui.table("Labels of the sources with a quota or a floor", plan.sources, [*plan.sources[0]])
    labels = plan.labels
    ui.say(
        f"{labels['bought']} labels bought"
        + _priced(labels["bought"], labels["spent"])
        + f", {labels['to_buy']} to buy"
        + _priced(labels["to_buy"], labels["cost_to_buy"])
        + (f", {labels['over_budget']} over the budget" if labels["over_budget"] else "")
        + (f", {labels['over_quota']} over their quota" if labels["over_quota"] else "")
        + ("." if written else "; nothing was written (--dry-run).")
    )
    for note in plan.notes:
        ui.say(note)
    _show_review(plan, run)
    if written and labels["to_buy"]:
        ui.say(f"next: pivottrace annotate export {run} FILE")


def _priced(count: int, cost: float) -> str:
    """What the labels cost, unless that is their number."""
    return "" if cost == count else f" for {cost:g}"


def _threshold(value: float | None, interval: tuple[float | None, float | None]) -> str:
    """Such as `0.62 [0.55, 0.71]`."""
    low, high = (_number(end) for end in interval)
    return f"{_number(value)} [{low}, {high}]"


def _number(value: float | None) -> str:
    return "nowhere" if value is None else f"{value:.2f}"


def _show_review(plan: Plan, run: Path) -> None:
    from pivottrace_verl.plan import TRUNCATED

    count = plan.counts()["review"]
    if not count:
        return
    bought = plan.labels["probes_in_review"]
    ui.say(
        f"{count} prompts are set apart for review: their rollouts are broken, which is not the "
        "same as hard. They are neither bought nor trained on"
        + (f"; {bought} labelled probes among them do not calibrate" if bought else "")
        + f". List them: pivottrace export {run} review.csv --route review"
    )
    cut = sum(row["prompts"] for row in plan.route_rows() if row["reason"] == TRUNCATED)
    if cut:
        ui.say(
            f"{cut} of them are truncated: score with a higher --max-tokens, or, if this policy "
            "answers first and then rambles on, triage with --max-truncated 1."
        )


@told
def export(
    run: RunPath,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="Folder to write to; with --route a .jsonl, .csv or .parquet file."
        ),
    ],
    with_self_train: Annotated[
        bool, typer.Option(help="Add the rows without a label, which need `pivottrace train`.")
    ] = False,
    route: Annotated[
        str | None, typer.Option(help="List the prompts of one route, such as review, instead.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write train.parquet and val.parquet for stock verl, or list the prompts of a route."""
    from pivottrace_verl.planning import list_route
    from pivottrace_verl.training.data import export_for_verl

    if route is not None and with_self_train:
        raise PivotTraceError("--route lists prompts, so --with-self-train has no meaning there.")
    with ExitStack() as stack:
        opened_run = opened(run, stack)
        if route is not None:
            count = list_route(opened_run, route, out)
            result: dict[str, Any] = {"route": route, "prompts": count}
            said = [f"{count} prompts of route {route} are listed in {out}."]
        else:
            exported = export_for_verl(opened_run, out, self_train=with_self_train)
            result, said = asdict(exported), exported.sentences(out)
    if as_json:
        ui.print_json(result)
        return
    for sentence in said:
        ui.say(sentence)
