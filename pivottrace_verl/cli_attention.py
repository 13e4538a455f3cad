"""`pivottrace calibrate`: which layers and heads are captured, chosen on rollouts of the run."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from pivottrace_verl import ui
from pivottrace_verl.cli_base import (
    AsJson,
    EngineOptions,
    RunPath,
    Seed,
    engine_options,
    opened,
    told,
)
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.pool import RunDir


@told
def calibrate(
    run: RunPath,
    rollouts: Annotated[int, typer.Option(min=1, help="Rollouts that are measured.")] = 96,
    layers: Annotated[
        int, typer.Option(min=1, help="Candidate layers, evenly in the middle third.")
    ] = 5,
    share: Annotated[float, typer.Option(help="Share of their heads that is kept.")] = 0.3,
    max_sink: Annotated[
        float, typer.Option(help="Heads with more attention than this on the sink are left out.")
    ] = 0.9,
    response_only: Annotated[
        bool, typer.Option(help="Measure attention on response tokens only.")
    ] = False,
    max_prompt_tokens: Annotated[int, typer.Option(min=1)] = 512,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest rollout, in tokens.")] = 1024,
    temperature: Annotated[float, typer.Option(min=0.0)] = 1.0,
    engine: EngineOptions = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Choose the layers and heads that look far back; `score` and `train` then capture only those.

    Optional, and before `score`. The choice is in RUN/capture.json; without that file two layers
    are captured and all heads averaged.
    """
    from pivottrace_verl.attention.heads import FILE, HeadConfig, choose, write_choice

    config = HeadConfig(rollouts, layers, share, max_sink=max_sink, response_only=response_only)
    with ExitStack() as stack:
        opened_run = opened(run, stack)
        if opened_run.finished_parts():
            raise PivotTraceError(
                f"{run} is scored already, with the layers and heads in its manifest: choose heads "
                "before `pivottrace score`, in a new run directory."
            )
        made = _rollouts(
            opened_run,
            rollouts,
            max_prompt_tokens,
            max_tokens,
            temperature,
            seed,
            engine_options(engine),
        )
        bar = None if as_json else stack.enter_context(ui.Bar("replay"))
        candidates, distance, sink_mass = _measure(opened_run.model_path(), made, config, bar)
        chosen = choose(candidates, distance, sink_mass, config)
        content = write_choice(opened_run, chosen, candidates, distance, sink_mass, config)
    if as_json:
        ui.print_json(content)
        return
    n_heads = sum(map(len, chosen.values()))
    where = "; ".join(f"layer {i}: {', '.join(map(str, heads))}" for i, heads in chosen.items())
    sinks = int((sink_mass > max_sink).sum())
    ui.say(
        f"{n_heads} of {distance.size} heads are captured from now on ({where}), {sinks} sink "
        f"heads left out; frozen in {run / FILE}."
    )


def _rollouts(
    run: RunDir,
    n: int,
    max_prompt_tokens: int,
    max_tokens: int,
    temperature: float,
    seed: int,
    options: dict[str, Any],
) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, output ids) of rollouts of prompts spread over the pool, without capture."""
    from pivottrace_verl.generation import Engine, Request
    from pivottrace_verl.score_rows import rollout_seed

    prompts = run.pool()
    at = [i * len(prompts) // n for i in range(n)]
    with Engine(
        run.model_path(),
        max_prompt_tokens=max_prompt_tokens,
        max_tokens=max_tokens,
        options=options,
    ) as engine:
        requests = []
        for i, place in enumerate(at):
            ids = engine.chat_ids(prompts[place].messages)
            if len(ids) > max_prompt_tokens:
                raise PivotTraceError(
                    f"prompt {prompts[place].pt_id} has {len(ids)} tokens, more than the limit of "
                    f"{max_prompt_tokens}; raise it with --max-prompt-tokens."
                )
            again = at.index(place)  # a pool smaller than n gives a prompt several rollouts
            requests.append(
                Request(ids, rollout_seed(seed, prompts[place].pt_id, i - again), temperature)
            )
        outputs = engine.generate(requests)
    return [
        (request.prompt_ids, output.token_ids)
        for request, output in zip(requests, outputs, strict=True)
        if output.token_ids
    ]


def _measure(
    model_path: Path,
    rollouts: list[tuple[list[int], list[int]]],
    config: Any,
    bar: ui.Bar | None,
) -> tuple[tuple[int, ...], Any, Any]:
    """Candidate layers, and [L, H] distance and attention on the sink of each of their heads."""
    import torch
    from transformers import AutoModelForCausalLM

    from pivottrace_verl.attention.heads import candidate_layers
    from pivottrace_verl.attention.replay import full_attention_layers, head_distances

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    candidates = candidate_layers(full_attention_layers(model), config.n_layers)

    def progress(done: int) -> None:
        if bar is not None and (done % 8 == 0 or done == len(rollouts)):
            bar.update(done, len(rollouts), "rollouts read")

    return candidates, *head_distances(model, rollouts, candidates, config, progress)
