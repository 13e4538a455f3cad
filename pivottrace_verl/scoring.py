"""The score stage: pool -> rollouts with traces -> one record a prompt.

Contract: prompts are scored in parts of fixed size, in the pool's order; a part is written
atomically when complete, so a killed run repeats at most one part. The detector's tau is taken
from the first rollouts and frozen in the manifest before any pivot is counted. No label is read
here: the pool on disk holds none.
Axes: P prompts, G rollouts of a prompt, T tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from safetensors.numpy import save

from pivottrace_verl.answers import AnswerKind, cluster, get_answers, majority
from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.estimators import ESTIMATORS, GroupRecord, RolloutRecord
from pivottrace_verl.files import write_bytes_atomic, write_json_atomic
from pivottrace_verl.generation import Engine, Request, Rollout
from pivottrace_verl.pivots import DetectorConfig, calibrate_tau, find_pivots
from pivottrace_verl.pool import Prompt, RunDir

Progress = Callable[[int, int, str], None]
"""Called with (prompts done, prompts in all, what happened)."""


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
    """Rollouts of the first part from which tau is taken."""
    keep_traces: int = 16
    """Prompts of the first part whose raw traces are kept for the report."""


def rollout_seed(seed: int, pt_id: str, rollout: int) -> int:
    """The sampling seed of one rollout, in [0, 2**31): depends on the prompt, not on its place."""
    digest = hashlib.sha256(f"score/{seed}/{pt_id}/{rollout}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def score(
    run: RunDir,
    config: ScoreConfig,
    capture: CaptureConfig,
    detector: DetectorConfig,
    progress: Progress,
) -> None:
    """Score every prompt of the run's pool that is not scored yet, then merge the parts.

    Raises PivotTraceError if finished parts were made with other settings, if a prompt is longer
    than `max_prompt_tokens`, or if no rollout of the first part was traced.
    """
    settings = {
        "score": dataclasses.asdict(config),
        "capture": capture.to_dict(),
        "detector": {k: v for k, v in detector.to_dict().items() if k != "tau"},
    }
    model = run.model_path()
    prompts = run.pool()
    _check_settings(run, json.loads(json.dumps(settings)))
    parts = [prompts[i : i + config.part_size] for i in range(0, len(prompts), config.part_size)]
    finished = set(run.finished_parts())
    done = sum(len(part) for i, part in enumerate(parts) if i in finished)
    todo = [i for i in range(len(parts)) if i not in finished]
    if todo:
        progress(done, len(prompts), "starting vLLM with capture on")
        with Engine(
            model,
            max_prompt_tokens=config.max_prompt_tokens,
            max_tokens=config.max_tokens,
            capture=capture,
        ) as engine:
            for i in todo:
                _score_part(run, i, parts[i], engine, config, detector)
                done += len(parts[i])
                progress(done, len(prompts), f"part {i + 1} of {len(parts)} written")
    run.merge_scores()


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


def _score_part(
    run: RunDir,
    number: int,
    prompts: Sequence[Prompt],
    engine: Engine,
    config: ScoreConfig,
    detector: DetectorConfig,
) -> None:
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
    groups = [rollouts[i : i + config.rollouts] for i in range(0, len(rollouts), config.rollouts)]
    frozen = _frozen_detector(run, rollouts, config, detector)
    if number == 0 and config.keep_traces:
        _write_traces(run, prompts[: config.keep_traces], groups, engine, kind, config)
    rows = [
        _row(prompt, group, config, kind, frozen)
        for prompt, group in zip(prompts, groups, strict=True)
    ]
    run.write_score_part(number, rows)


def _frozen_detector(
    run: RunDir, rollouts: Sequence[Rollout], config: ScoreConfig, detector: DetectorConfig
) -> DetectorConfig:
    """The run's detector: from the manifest, or calibrated now and written there."""
    if "detector" in run.manifest:
        return DetectorConfig.from_dict(run.manifest["detector"])
    traces = [r.trace.stats for r in rollouts[: config.calibration_rollouts] if r.trace is not None]
    if not traces:
        raise PivotTraceError(
            "no attention trace arrived from vLLM, so no pivot can be found: "
            "`pivottrace doctor` says what is wrong with the capture."
        )
    frozen = (
        detector
        if detector.tau is not None
        else dataclasses.replace(detector, tau=calibrate_tau(traces, detector))
    )
    run.update_manifest(detector=frozen.to_dict())
    return frozen


def _row(
    prompt: Prompt,
    group: Sequence[Rollout],
    config: ScoreConfig,
    kind: AnswerKind,
    detector: DetectorConfig,
) -> dict[str, Any]:
    answers = [kind.extract(rollout.text) for rollout in group]
    clusters = cluster(answers, kind)
    records = []
    for rollout, answer in zip(group, answers, strict=True):
        n_tokens = len(rollout.token_ids)
        trace = rollout.trace
        records.append(
            RolloutRecord(
                n_tokens=n_tokens,
                pivots=len(find_pivots(trace.stats, detector)) if trace is not None else None,
                entropy_mean=float(trace.token_entropy.mean()) if trace is not None else None,
                logprob_mean=rollout.logprob_mean,
                answer=answer,
                truncated=rollout.truncated,
            )
        )
    record = GroupRecord(pt_id=prompt.pt_id, rollouts=records, clusters=clusters, seed=config.seed)
    return {
        "pt_id": prompt.pt_id,
        "n_rollouts": len(group),
        "answers": [{"answer": a, "count": c} for a, c in clusters.clusters],
        "majority": majority(clusters),
        "unparseable": clusters.unparseable,
        "truncated": sum(r.truncated for r in records),
        "length_mean": float(np.mean([r.n_tokens for r in records])),
        "logprob_mean": float(np.mean([r.logprob_mean for r in records])),
        **{f"uncertainty/{name}": estimate(record) for name, estimate in ESTIMATORS.items()},
        "rollouts": [
            {
                "seed": rollout_seed(config.seed, prompt.pt_id, g),
                "answer": r.answer,
                "n_tokens": r.n_tokens,
                "truncated": r.truncated,
                "pivots": r.pivots,
                "pivot_density": None if r.pivots is None else r.pivots / max(r.n_tokens, 1),
                "entropy": r.entropy_mean,
                "traced": r.pivots is not None,
            }
            for g, r in enumerate(records)
        ],
    }


def _write_traces(
    run: RunDir,
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[Rollout]],
    engine: Engine,
    kind: AnswerKind,
    config: ScoreConfig,
) -> None:
    """Raw traces of a few prompts' first rollouts, with their tokens, for the report."""
    tensors: dict[str, np.ndarray] = {}
    texts: dict[str, dict[str, Any]] = {}
    for prompt, group in zip(prompts, groups, strict=False):
        for g, rollout in enumerate(group[:2]):
            if rollout.trace is None:
                continue
            name = f"{prompt.pt_id}/{g}"
            tensors[name] = np.ascontiguousarray(rollout.trace.stats)
            tensors[f"{name}/token_entropy"] = np.ascontiguousarray(rollout.trace.token_entropy)
            texts[name] = {
                "tokens": [engine.tokenizer.decode([token]) for token in rollout.token_ids],
                "seed": rollout_seed(config.seed, prompt.pt_id, g),
                "answer": kind.extract(rollout.text),
            }
    write_bytes_atomic(run.path / "traces" / "part-00000.safetensors", save(tensors))
    write_json_atomic(run.path / "traces" / "part-00000.json", texts)
