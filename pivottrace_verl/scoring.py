"""The score stage: pool -> rollouts with traces -> one record a prompt.

Contract: prompts are scored in parts of fixed size, in the pool's order; a part is written
atomically when complete, so a killed run repeats at most one part, and ends with the same bytes of
scores as one that was not killed. Every threshold is taken from the first rollouts and frozen in
the manifest before any pivot is counted. No label is read here: the pool on disk holds none.
Axes: P prompts, G rollouts of a prompt, T tokens.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pivottrace_verl.answers import extract_many, get_answers
from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.generation import Engine, Request, Rollout
from pivottrace_verl.pivots import DetectorConfig
from pivottrace_verl.pool import Prompt, RunDir
from pivottrace_verl.score_rows import make_row, rollout_seed, write_traces
from pivottrace_verl.traces import Thresholds, calibrate

if TYPE_CHECKING:
    from pivottrace_verl.hidden_states import LayerStates

Progress = Callable[[int, int, str], None]
"""Called with (prompts done, prompts in all, what happened)."""

TIMINGS = ("score_generating", "score_hidden_states", "score_own")
"""Entries of the manifest's timings: seconds, over all sessions that wrote a part, in vLLM, in the
second forward pass, and in everything else (prompts, traces, answers, estimators, files)."""


@dataclass(frozen=True)
class ScoreConfig:
    """Settings of the score stage; kept in the manifest, and a part made with others is refused."""

    rollouts: int = 8
    temperature: float = 1.0
    max_prompt_tokens: int = 512
    max_tokens: int = 1024
    seed: int = 0
    part_size: int = 64
    """Prompts a part: what a killed run loses at most."""
    calibration_rollouts: int = 96
    """Rollouts of the first part from which the thresholds are taken."""
    keep_traces: int = 16
    """Prompts of the first part whose raw traces are kept for the report."""
    hidden_states: bool = False
    """Read every rollout once more for the estimators that need hidden states."""


def score(
    run: RunDir,
    config: ScoreConfig,
    capture: CaptureConfig,
    detector: DetectorConfig,
    progress: Progress,
) -> None:
    """Score every prompt of the run's pool that is not scored yet, then merge the parts.

    Raises PivotTraceError if finished parts were made with other settings or by another version,
    if a prompt is longer than `max_prompt_tokens`, or if no rollout of the first part was traced.
    """
    settings = {
        "score": dataclasses.asdict(config),
        "capture": capture.to_dict(),
        "detector": {k: v for k, v in detector.to_dict().items() if k != "tau"},
    }
    model = run.model_path()
    prompts = run.pool()
    run.check_score_parts()
    _check_settings(run, json.loads(json.dumps(settings)))
    parts = [prompts[i : i + config.part_size] for i in range(0, len(prompts), config.part_size)]
    finished = set(run.finished_parts())
    done = sum(len(part) for i, part in enumerate(parts) if i in finished)
    todo = [i for i in range(len(parts)) if i not in finished]
    if todo:
        if not finished:
            run.update_manifest(timings=dict.fromkeys(TIMINGS, 0.0))
        progress(done, len(prompts), "starting vLLM with capture on")
        states = _layer_states(model) if config.hidden_states else None
        with Engine(
            model,
            max_prompt_tokens=config.max_prompt_tokens,
            max_tokens=config.max_tokens,
            capture=capture,
        ) as engine:
            for i in todo:
                _score_part(run, i, parts[i], engine, states, config, detector)
                done += len(parts[i])
                progress(done, len(prompts), f"part {i + 1} of {len(parts)} written")
    start = time.monotonic()
    run.merge_scores()
    if todo:
        _add_timings(run, score_own=time.monotonic() - start)


def _layer_states(model: Path) -> LayerStates:
    from pivottrace_verl.hidden_states import LayerStates

    return LayerStates(model)


def _check_settings(run: RunDir, settings: dict[str, Any]) -> None:
    before = run.manifest.get("settings", {}).get("score")
    if before is not None and before != settings and run.finished_parts():
        changed = sorted(
            f"{group}.{name}: {before.get(group, {}).get(name)!r} on disk, {value!r} asked for"
            for group, values in settings.items()
            for name, value in values.items()
            if before.get(group, {}).get(name) != value
        )
        raise PivotTraceError(
            f"the scores in {run.path} were made with other settings ({'; '.join(changed)}): "
            "repeat those settings, or start a new run directory."
        )
    if before != settings:
        run.update_manifest(settings={"score": settings})


def _add_timings(run: RunDir, **seconds: float) -> None:
    before = run.manifest.get("timings", {})
    run.update_manifest(
        timings={name: round(before.get(name, 0.0) + s, 3) for name, s in seconds.items()}
    )


def _score_part(
    run: RunDir,
    number: int,
    prompts: Sequence[Prompt],
    engine: Engine,
    states_of: LayerStates | None,
    config: ScoreConfig,
    detector: DetectorConfig,
) -> None:
    start, generated = time.monotonic(), engine.seconds_generating
    kind = get_answers(run.manifest["answers"]["kind"])
    requests = []
    for prompt in prompts:
        ids = engine.chat_ids(prompt.messages)
        if len(ids) > config.max_prompt_tokens:
            raise PivotTraceError(
                f"prompt {prompt.pt_id} has {len(ids)} tokens, more than the limit of "
                f"{config.max_prompt_tokens}; raise it with --max-prompt-tokens."
            )
        requests += [
            Request(ids, rollout_seed(config.seed, prompt.pt_id, g), config.temperature)
            for g in range(config.rollouts)
        ]
    rollouts = engine.generate(requests)
    reading = time.monotonic()
    states: Sequence[np.ndarray | None] = [None] * len(rollouts)
    if states_of is not None:
        pairs = zip(requests, rollouts, strict=True)
        states = states_of([(q.prompt_ids, r.token_ids) for q, r in pairs])
    read = time.monotonic() - reading
    if number == 0:
        thresholds = _calibrated(rollouts[: config.calibration_rollouts], detector)
        run.update_manifest(**thresholds.to_manifest())
    else:
        thresholds = Thresholds.from_manifest(run.manifest)
    answers = extract_many(kind, [rollout.text for rollout in rollouts])
    places = [slice(i, i + config.rollouts) for i in range(0, len(rollouts), config.rollouts)]
    if number == 0 and config.keep_traces:
        write_traces(
            run.path / "traces",
            prompts[: config.keep_traces],
            [rollouts[place] for place in places[: config.keep_traces]],
            [answers[place] for place in places[: config.keep_traces]],
            tokenizer=engine.tokenizer,
            seed=config.seed,
        )
    rows = [
        make_row(
            prompt,
            rollouts[place],
            answers[place],
            states[place],
            kind=kind,
            thresholds=thresholds,
            seed=config.seed,
        )
        for prompt, place in zip(prompts, places, strict=True)
    ]
    run.write_score_part(number, rows)
    generating = engine.seconds_generating - generated
    own = time.monotonic() - start - generating - read
    _add_timings(run, score_generating=generating, score_hidden_states=read, score_own=own)


def _calibrated(rollouts: Sequence[Rollout], detector: DetectorConfig) -> Thresholds:
    traces = [(r.trace.stats, r.trace.token_entropy) for r in rollouts if r.trace is not None]
    if not traces:
        raise PivotTraceError(
            "no attention trace arrived from vLLM, so no pivot can be found: "
            "`pivottrace doctor` says what is wrong with the capture."
        )
    return calibrate(traces, detector)
