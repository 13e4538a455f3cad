"""`pivottrace score`: rollouts of the whole pool, their traces, and every estimator."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Annotated

import typer

from pivottrace_verl import ui
from pivottrace_verl.cli_base import (
    EngineOptions,
    RunPath,
    Seed,
    complain,
    engine_options,
    opened,
    told,
)
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.score_columns import traced_rollouts


@told
def score(
    run: RunPath,
    rollouts: Annotated[int, typer.Option(min=2, help="Rollouts a prompt.")] = 8,
    max_prompt_tokens: Annotated[int, typer.Option(min=1)] = 512,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest rollout, in tokens.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0.0)] = 1.0,
    part_size: Annotated[int, typer.Option(min=1, help="Prompts a resumable part.")] = 64,
    layers: Annotated[
        str | None, typer.Option(help="Traced layers, such as 9,13; default: two in the middle.")
    ] = None,
    signal: Annotated[str, typer.Option(help="Row signal of the detector.")] = (
        "response_long_mass"
    ),
    window: Annotated[int, typer.Option(min=1, help="W: long-range means this far back.")] = 32,
    tau: Annotated[
        float | None, typer.Option(help="Change that is a pivot; default: from the rollouts.")
    ] = None,
    capture: Annotated[
        str,
        typer.Option(
            help="Attention traces: on, by the engine; replay, by reading every rollout once more "
            "in Hugging Face, where the engine cannot; off, without pivots."
        ),
    ] = "on",
    hidden_states: Annotated[
        bool,
        typer.Option(
            help="Also score what needs hidden states (coe, cot_kinetics), reading every "
            "rollout once more in Hugging Face."
        ),
    ] = False,
    engine: EngineOptions = None,
    seed: Seed = 0,
) -> None:
    """Roll out every prompt in vLLM with attention captured, and score its uncertainty.

    A killed run goes on where it was. With --capture off, what needs no trace is scored:
    consistency, length, nll, random.
    """
    from pivottrace_verl.attention.config import CaptureConfig
    from pivottrace_verl.attention.heads import FILE, frozen_choice
    from pivottrace_verl.pivots import DetectorConfig
    from pivottrace_verl.scoring import ScoreConfig
    from pivottrace_verl.scoring import score as score_pool

    config = ScoreConfig(
        rollouts=rollouts,
        temperature=temperature,
        max_prompt_tokens=max_prompt_tokens,
        max_tokens=max_tokens,
        seed=seed,
        part_size=part_size,
        hidden_states=hidden_states,
        capture=capture,
    )
    named, options = _numbers("--layers", layers), engine_options(engine)
    detector = DetectorConfig(signal=signal, window=window, tau=tau)
    timings: dict[str, float] = {}
    with ExitStack() as stack:
        opened_run = opened(run, stack)
        chosen = frozen_choice(opened_run)
        if named is not None and chosen is not None:
            raise PivotTraceError(
                f"--layers names layers, but {run / FILE} holds those that were calibrated: leave "
                "the option out, or remove the file."
            )
        what = CaptureConfig(window=window, **(chosen or {"layers": named}))
        with ui.timed(timings, "score"), ui.Bar("score") as bar:
            score_pool(opened_run, config, what, detector, bar.update, options)
        opened_run.update_manifest(timings=timings)
        table, manifest = opened_run.scores(), opened_run.manifest
        traced, total = traced_rollouts(table)
        tau = manifest["detector"]["tau"] if capture != "off" else None
    traces = "" if tau is None else f"{traced} of {total} rollouts traced, tau {tau:.4f}, "
    ui.say(
        f"{table.num_rows} prompts scored; {traces}"
        f"{sum(table['unparseable'].to_pylist())} answers unparseable, "
        f"{sum(table['timed_out'].to_pylist())} timed out, "
        f"{sum(table['truncated'].to_pylist())} rollouts truncated."
    )
    if capture == "off":
        ui.say(
            "Without traces no pivots: rank by what needs none, as in `pivottrace probe "
            f"{run} --estimator consistency`."
        )
    if traced < total and tau is not None:
        complain(
            f"{total - traced} rollouts have no attention trace, and no pivot statistic counts "
            f"them; of the engine's traces {_told(manifest.get('traces', {}))}.",
            "warning",
        )
    if tau == 0.0:
        complain(
            f"tau is 0: attention on tokens {window} or more back hardly ever changes, so pivots "
            "say nothing here; score into a new run directory with a smaller --window.",
            "warning",
        )


def _told(counts: dict[str, int]) -> str:
    """What the manifest counts of the traces' way, as the end of a sentence."""
    return ", ".join(f"{n} were {name}" for name, n in counts.items() if n) or "none was sent"


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise PivotTraceError(
            f"{option} must be whole numbers with commas, not {text!r}."
        ) from error
