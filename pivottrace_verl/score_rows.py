"""One row of the scores from the rollouts of one prompt.

Contract: a row depends on its prompt's rollouts, their answers, the answers kind and the frozen
thresholds alone; no label is read. Answers come as `answers.extract_many` reads them, a whole part
at once: a text that could not be read in time counts as timed out, not as unparseable.
`traces/part-00000.*` holds the raw traces of a few prompts for the report.
Axes: G rollouts of a prompt, T tokens, L layers of the model, D hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from pivottrace_verl.answers import Answer, AnswerKind, cluster, majority
from pivottrace_verl.estimators import ESTIMATORS, GroupRecord, RolloutRecord
from pivottrace_verl.files import write_bytes_atomic, write_json_atomic
from pivottrace_verl.generation import Rollout
from pivottrace_verl.pool import Prompt
from pivottrace_verl.traces import Thresholds, features, read_trace


def rollout_seed(seed: int, pt_id: str, rollout: int) -> int:
    """The sampling seed of one rollout, in [0, 2**31): depends on the prompt, not on its place."""
    digest = hashlib.sha256(f"score/{seed}/{pt_id}/{rollout}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def make_row(
    prompt: Prompt,
    rollouts: Sequence[Rollout],
    answers: Sequence[Answer],
    states: Sequence[np.ndarray | None],
    *,
    kind: AnswerKind,
    thresholds: Thresholds | None,
    seed: int,
) -> dict[str, Any]:
    """Columns of `SCORE_SCHEMA` from G rollouts, their answers and their hidden states [L + 1, D],
    or None; `thresholds` is None where no rollout has a trace."""
    clusters = cluster(answers, kind)
    records = [
        _record(rollout, answer, layers, thresholds)
        for rollout, answer, layers in zip(rollouts, answers, states, strict=True)
    ]
    group = GroupRecord(pt_id=prompt.pt_id, rollouts=records, clusters=clusters, seed=seed)
    return {
        "pt_id": prompt.pt_id,
        "n_rollouts": len(records),
        "answers": [{"answer": a, "count": c} for a, c in clusters.clusters],
        "majority": majority(clusters),
        "unparseable": clusters.unparseable,
        "timed_out": clusters.timed_out,
        "truncated": sum(r.truncated for r in records),
        "length_mean": float(np.mean([r.n_tokens for r in records])),
        "logprob_mean": float(np.mean([r.logprob_mean for r in records])),
        **{f"uncertainty/{name}": estimate(group) for name, estimate in ESTIMATORS.items()},
        **{f"features/{name}": value for name, value in features(group).items()},
        "rollouts": [
            {"seed": rollout_seed(seed, prompt.pt_id, g), **_rollout_row(r)}
            for g, r in enumerate(records)
        ],
    }


def _record(
    rollout: Rollout, answer: Answer, states: np.ndarray | None, thresholds: Thresholds | None
) -> RolloutRecord:
    trace = rollout.trace
    return RolloutRecord(
        n_tokens=len(rollout.token_ids),
        logprob_mean=rollout.logprob_mean,
        answer=_text(answer),
        truncated=rollout.truncated,
        trace=None
        if trace is None or thresholds is None
        else read_trace(trace.stats, trace.token_entropy, trace.self_certainty, thresholds),
        layer_states=states,
    )


def _text(answer: Answer) -> str | None:
    return answer if isinstance(answer, str) else None


def _rollout_row(rollout: RolloutRecord) -> dict[str, Any]:
    """Columns of `schemas.ROLLOUT` without the seed."""
    trace = rollout.trace
    return {
        "answer": rollout.answer,
        "n_tokens": rollout.n_tokens,
        "truncated": rollout.truncated,
        "logprob": rollout.logprob_mean,
        "traced": trace is not None,
        "pivots": trace and trace.pivots,
        "pivot_density": trace and rollout.per_token(trace.pivots),
        "entropy": trace and trace.entropy_mean,
        "self_certainty": trace and trace.self_certainty_mean,
        "entropy_forks": trace and rollout.per_token(trace.forks),
    }


def write_traces(
    folder: Path,
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[Rollout]],
    answers: Sequence[Sequence[Answer]],
    *,
    tokenizer: Any,
    seed: int,
) -> None:
    """Raw traces of each prompt's first two rollouts, with their tokens and their answers, for the
    report."""
    tensors: dict[str, np.ndarray] = {}
    texts: dict[str, dict[str, Any]] = {}
    for prompt, group, read in zip(prompts, groups, answers, strict=True):
        for g, rollout in enumerate(group[:2]):
            if rollout.trace is None:
                continue
            name = f"{prompt.pt_id}/{g}"
            tensors[name] = np.ascontiguousarray(rollout.trace.stats)
            tensors[f"{name}/token_entropy"] = np.ascontiguousarray(rollout.trace.token_entropy)
            texts[name] = {
                "tokens": [tokenizer.decode([token]) for token in rollout.token_ids],
                "seed": rollout_seed(seed, prompt.pt_id, g),
                "answer": _text(read[g]),
            }
    write_bytes_atomic(folder / "part-00000.safetensors", save(tensors))
    write_json_atomic(folder / "part-00000.json", texts)
