"""The score stage: pool -> rollouts with traces -> one record a prompt.

Traces come from the engine (`--capture on`), from a second forward pass of the same model in
Hugging Face (`replay`), or not at all (`off`). A trace that the engine's workers lost is counted,
and its rollout has none: a replay in its place would make the scores depend on what was lost.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pivottrace_verl.answers import extract_many, get_answers
from pivottrace_verl.attention.config import WITHOUT_CAPTURE, CaptureConfig
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.generation import Engine, Request, Rollout
from pivottrace_verl.pivots import DetectorConfig
from pivottrace_verl.pool import Prompt, RunDir
from pivottrace_verl.score_rows import make_row, rollout_seed, write_traces
from pivottrace_verl.traces import Thresholds, calibrate

if TYPE_CHECKING:
    from pivottrace_verl.attention.replay import Replayer
    from pivottrace_verl.hidden_states import LayerStates

Progress = Callable[[int, int, str], None]
"""Called with (prompts done, prompts in all, what happened)."""

CAPTURES = ("on", "off", "replay")
"""Where traces come from: the engine, nowhere, a second forward pass."""

TIMINGS = ("score_generating", "score_hidden_states", "score_replay", "score_own")
"""Entries of the manifest's timings: seconds, over all sessions that wrote a part, in vLLM, in the
second forward passes, and in everything else (prompts, traces, answers, estimators, files)."""

REPLAYED = 8
"""Prompts between two words on how far a replay is."""


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
    capture: str = "on"
    """One of `CAPTURES`."""

    def __post_init__(self) -> None:
        if self.capture not in CAPTURES:
            raise PivotTraceError(
                f"--capture must be one of {', '.join(CAPTURES)}, not {self.capture!r}."
            )


def score(
    run: RunDir,
    config: ScoreConfig,
    capture: CaptureConfig,
    detector: DetectorConfig,
    progress: Progress,
    engine_options: Mapping[str, Any] | None = None,
) -> None:
    """Score every prompt of the run's pool that is not scored yet, then merge the parts.

    `engine_options` say how vLLM runs, not what it computes: a resumed run may have others.

    Raises PivotTraceError if finished parts were made with other settings or by another version,
    if a prompt is longer than `max_prompt_tokens`, or if no rollout of the first part was traced
    though they should be.
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
        replayer = _replayer(model, capture) if config.capture == "replay" else None
        captures = config.capture == "on"
        how = "with capture on" if captures else "without capture"
        progress(done, len(prompts), f"starting vLLM {how}")
        states = _layer_states(model) if config.hidden_states else None
        with Engine(
            model,
            max_prompt_tokens=config.max_prompt_tokens,
            max_tokens=config.max_tokens,
            capture=capture if captures else None,
            shares_device=replayer is not None,
            options=engine_options,
        ) as engine:
            if captures and not finished:
                run.update_manifest(traces=dict.fromkeys(engine.trace_counts, 0))
            for i in todo:
                tell = partial(progress, done, len(prompts))
                _score_part(run, i, parts[i], engine, replayer, states, config, detector, tell)
                done += len(parts[i])
                missing = engine.trace_counts.get("missing", 0)
                progress(
                    done,
                    len(prompts),
                    f"part {i + 1} of {len(parts)} written"
                    + (f", {missing} traces missing so far" if missing else ""),
                )
    start = time.monotonic()
    run.merge_scores()
    if todo:
        _add(run, "timings", score_own=time.monotonic() - start)


def _layer_states(model: Path) -> LayerStates:
    from pivottrace_verl.hidden_states import LayerStates

    return LayerStates(model)


def _replayer(model: Path, capture: CaptureConfig) -> Replayer:
    from pivottrace_verl.attention.replay import Replayer

    return Replayer(model, capture)


def _check_settings(run: RunDir, settings: dict[str, Any]) -> None:
    before = run.manifest.get("settings", {}).get("score")
    if before is not None:
        # There was no choice when a manifest without an entry was written.
        before = {**before, "score": {"capture": "on", **before.get("score", {})}}
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


def _add(run: RunDir, section: str, **amounts: float) -> None:
    """Add to the numbers of a section of the manifest."""
    before = run.manifest.get(section, {})
    run.update_manifest(
        **{section: {name: round(before.get(name, 0) + x, 3) for name, x in amounts.items()}}
    )


def _score_part(
    run: RunDir,
    number: int,
    prompts: Sequence[Prompt],
    engine: Engine,
    replayer: Replayer | None,
    states_of: LayerStates | None,
    config: ScoreConfig,
    detector: DetectorConfig,
    tell: Callable[[str], None],
) -> None:
    start, generated = time.monotonic(), engine.seconds_generating
    counted = engine.trace_counts
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
    replaying = time.monotonic()
    if replayer is not None:
        with engine.resting(), replayer.on_device():
            rollouts = _replayed(replayer, requests, rollouts, config.rollouts, tell)
    reading = time.monotonic()
    replayed = reading - replaying
    states: Sequence[np.ndarray | None] = [None] * len(rollouts)
    if states_of is not None:
        pairs = zip(requests, rollouts, strict=True)
        states = states_of([(q.prompt_ids, r.token_ids) for q, r in pairs])
    read = time.monotonic() - reading
    thresholds: Thresholds | None
    if config.capture == "off":
        thresholds = None
    elif number == 0:
        thresholds = _calibrated(rollouts[: config.calibration_rollouts], detector)
        run.update_manifest(**thresholds.to_manifest())
    else:
        thresholds = Thresholds.from_manifest(run.manifest)
    answers = extract_many(kind, [rollout.text for rollout in rollouts])
    places = [slice(i, i + config.rollouts) for i in range(0, len(rollouts), config.rollouts)]
    if number == 0 and config.keep_traces and thresholds is not None:
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
    own = time.monotonic() - start - generating - replayed - read
    _add(
        run,
        "timings",
        score_generating=generating,
        score_hidden_states=read,
        score_replay=replayed,
        score_own=own,
    )
    counts = engine.trace_counts
    if counts:
        _add(run, "traces", **{name: counts[name] - counted[name] for name in counts})


def _replayed(
    replayer: Replayer,
    requests: Sequence[Request],
    rollouts: Sequence[Rollout],
    size: int,
    tell: Callable[[str], None],
) -> list[Rollout]:
    """The rollouts with their traces, prompt by prompt, of `size` rollouts each."""
    out: list[Rollout] = []
    n_prompts = len(rollouts) // size
    for done in range(n_prompts):
        place = slice(done * size, (done + 1) * size)
        pairs = zip(requests[place], rollouts[place], strict=True)
        traces = replayer([(request.prompt_ids, rollout.token_ids) for request, rollout in pairs])
        out += [
            dataclasses.replace(rollout, trace=trace)
            for rollout, trace in zip(rollouts[place], traces, strict=True)
        ]
        if (done + 1) % REPLAYED == 0:
            tell(f"{done + 1} of {n_prompts} generated prompts replayed")
    return out


def _calibrated(rollouts: Sequence[Rollout], detector: DetectorConfig) -> Thresholds:
    traces = [(r.trace.stats, r.trace.token_entropy) for r in rollouts if r.trace is not None]
    if not traces:
        raise PivotTraceError(
            "no attention trace arrived from vLLM, so no pivot can be found: `pivottrace doctor` "
            f"says what is wrong with the capture; {WITHOUT_CAPTURE}."
        )
    return calibrate(traces, detector)
