"""`pivottrace`: one verb a stage, each working on a run directory.

    pivottrace init RUN --pool pool.parquet --model MODEL
    pivottrace score RUN            pivottrace probe RUN
    pivottrace annotate export RUN FILE      pivottrace annotate import RUN FILE
    pivottrace triage RUN           pivottrace train RUN            pivottrace report RUN
    pivottrace export RUN FOLDER    pivottrace calibrate RUN        pivottrace doctor [RUN]

Contract: a verb can be killed and run again; bad input is one sentence on stderr and exit status
2, and leaves every file as it was. Heavy libraries are imported by the verbs that need them.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from pivottrace_verl import ui
from pivottrace_verl.cli_annotate import annotate_app
from pivottrace_verl.cli_attention import calibrate
from pivottrace_verl.cli_base import (
    AsJson,
    EngineOptions,
    RunPath,
    Seed,
    engine_options,
    opened,
    run_app,
    told,
)
from pivottrace_verl.cli_estimators import estimators
from pivottrace_verl.cli_score import score
from pivottrace_verl.cli_triage import export, probe, triage
from pivottrace_verl.pool import RunDir

app = typer.Typer(
    help="Label-efficient RLVR for verl: which unlabelled prompts deserve a label?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(annotate_app, name="annotate")
app.command()(estimators)
app.command()(calibrate)


@app.command()
@told
def init(
    run: RunPath,
    pool: Annotated[Path, typer.Option(help="Prompts: Parquet, JSONL or a datasets folder.")],
    model: Annotated[Path, typer.Option(help="The policy, a Hugging Face model folder.")],
    val: Annotated[Path | None, typer.Option(help="Validation prompts with their `label`.")] = None,
    answers: Annotated[
        str, typer.Option(help="math, exact, expression or package.module:factory.")
    ] = "math",
) -> None:
    """Make a run directory from a pool of prompts; answers in the pool are not read."""
    from pivottrace_verl.doctor import versions

    made = RunDir.create(run, pool, model, val_file=val, answers_kind=answers)
    with made.lock():
        made.update_manifest(versions=versions())
    facts = made.manifest["pool"]
    merged = facts["duplicates_merged"]
    ui.say(
        f"{run}: {facts['n_prompts']} distinct prompts"
        + (f" ({merged} duplicates merged)" if merged else "")
        + (f", {len(made.validation())} for validation" if val else "")
        + f"; answers are compared as {answers}."
    )


for verb in (score, probe, triage, export):
    app.command()(verb)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
@told
def train(
    context: typer.Context,
    run: RunPath,
    steps: Annotated[int, typer.Option(min=1)] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts a step.")] = 32,
    rollouts: Annotated[int, typer.Option(min=2, help="Rollouts a prompt.")] = 8,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 1e-6,
    order: Annotated[
        str, typer.Option(help="mixed, easy_to_hard, uncertainty_first or random.")
    ] = "mixed",
    self_train_weight: Annotated[
        float, typer.Option(min=0.0, help="Factor on the advantages of self_train prompts.")
    ] = 1.0,
    min_agreement: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share that must agree for a vote to count.")
    ] = 0.0,
    save_every: Annotated[
        int, typer.Option(min=0, help="Steps between checkpoints; 0: at the end.")
    ] = 0,
    val_samples: Annotated[int, typer.Option(min=1, help="Validation rollouts a prompt.")] = 4,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 1,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    seed: Seed = 0,
) -> None:
    """Train in verl on both rewards. Further words are Hydra overrides for verl."""
    from pivottrace_verl.training.launch import TrainConfig
    from pivottrace_verl.training.launch import train as train_run

    config = TrainConfig(
        steps=steps,
        batch_size=batch_size,
        rollouts=rollouts,
        learning_rate=learning_rate,
        seed=seed,
        order=order,
        self_train_weight=self_train_weight,
        min_agreement=min_agreement,
        val_samples=val_samples,
        save_every=save_every,
        n_gpus_per_node=gpus_per_node,
        nnodes=nodes,
    )
    timings: dict[str, float] = {}
    opened_run = RunDir.open(run)
    with ui.timed(timings, "train"), ui.Bar("train") as bar:
        bar.update(0, steps, "starting verl")

        def on_step(step: int, metrics: dict[str, float]) -> None:
            bar.update(step, steps, _headline(metrics))

        result = train_run(opened_run, config, context.args, on_step)
    # Labels may be coming in at this moment.
    with opened_run.lock(wait=60.0):
        opened_run.update_manifest(timings=timings)
    ui.say(f"{result['steps']} steps done; the model is in {run / result['checkpoint']}.")


def _headline(metrics: dict[str, float]) -> str:
    """The few of verl's metrics that fit on a line."""
    shown = []
    for name, value in metrics.items():
        if name.startswith("val-core/") and "acc/mean@" in name:
            shown.append(f"validation {value:.3f}")
    for route in ("annotate", "self_train"):
        if f"pivottrace/{route}/reward" in metrics:
            shown.append(f"{route} reward {metrics[f'pivottrace/{route}/reward']:.2f}")
    if "pivottrace/self_train/agreement" in metrics:
        shown.append(f"agreement {metrics['pivottrace/self_train/agreement']:.2f}")
    if metrics.get("pivottrace/guard/verdicts"):
        shown.append(f"collapse guard {metrics['pivottrace/guard/verdicts']:.0f}x")
    if "timing_s/step" in metrics:
        shown.append(f"{metrics['timing_s/step']:.1f} s")
    return ", ".join(shown)


@app.command()
@told
def evaluate(
    run: RunPath,
    when: Annotated[str, typer.Argument(help="before or after training.")],
    samples: Annotated[int, typer.Option(min=1, help="Rollouts a prompt at T=1.")] = 4,
    engine: EngineOptions = None,
    seed: Seed = 0,
) -> None:
    """Validation accuracy of the model before or after training: sampled, and greedy beside it."""
    from pivottrace_verl.planning import evaluate_run

    with ExitStack() as stack:
        result, fresh = evaluate_run(
            opened(run, stack),
            when,
            samples=samples,
            seed=seed,
            engine_options=engine_options(engine),
        )
    # A figure that was kept by an earlier version does not have it.
    late = result.get("timed_out", 0.0)
    ui.say(
        f"{when} training: {result['mean']:.1%} (mean of {result['samples']} at T=1), "
        f"{result['greedy']:.1%} greedy, over {result['n']} prompts"
        + (f", {late:.1%} of the answers timed out" if late else "")
        + ("." if fresh else "; evaluated earlier.")
    )


@app.command()
@told
def report(run: RunPath) -> None:
    """Write report.html, one self-contained page, and report.json beside it."""
    from pivottrace_verl.report import write_report

    with ExitStack() as stack:
        ui.say(f"{write_report(opened(run, stack))} written.")


@app.command()
@told
def doctor(
    run: Annotated[
        Path | None,
        typer.Argument(
            metavar="RUN",
            help="Prove the capture on this run's model, of the layers and heads it captures.",
        ),
    ] = None,
    as_json: AsJson = False,
    capture: Annotated[
        bool,
        typer.Option(help="Prove the capture, without RUN on a tiny model (about half a minute)."),
    ] = True,
    model: Annotated[
        Path | None, typer.Option(help="Prove it on this Hugging Face model instead.")
    ] = None,
) -> None:
    """Say what is installed, what loaded, and whether the capture tells the truth."""
    from pivottrace_verl.doctor import diagnose

    found = diagnose(capture=capture, model=model, run=run)
    if as_json:
        ui.print_json(found)
    else:
        for check in found["checks"]:
            mark = "ok  " if check["ok"] else ("FAIL" if check["needed"] else "note")
            ui.say(f"{mark}  {check['name']}: {check['says']}")
        ui.say("All that is needed is there." if found["ok"] else "Something needed is missing.")
    if not found["ok"]:
        raise typer.Exit(1)


def main() -> None:
    """The console script."""
    run_app(app)


if __name__ == "__main__":
    main()
