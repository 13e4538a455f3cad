"""Validation accuracy of a model, outside of training: sampled at T=1 and greedy.

The same code and the same seeds before and after training, so the two figures can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pivottrace_verl.answers import AnswerKind, Grade, extract_many, grade_many
from pivottrace_verl.generation import Engine, Request, Rollout


def evaluate(
    model: Path,
    prompts: Sequence[list[dict[str, str]]],
    labels: Sequence[str],
    *,
    answers: str,
    max_prompt_tokens: int,
    max_tokens: int,
    samples: int = 4,
    seed: int = 0,
    engine_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Roll out the prompts at temperature 1 and greedily; the figures of `accuracy`."""
    with Engine(
        model,
        max_prompt_tokens=max_prompt_tokens,
        max_tokens=max_tokens,
        options=engine_options,
    ) as engine:
        ids = [engine.chat_ids(messages) for messages in prompts]
        sampled = engine.generate(
            [
                Request(prompt, seed=seed * 1_000_003 + index * samples + sample)
                for index, prompt in enumerate(ids)
                for sample in range(samples)
            ]
        )
        greedy = engine.generate([Request(prompt, seed=0, temperature=0.0) for prompt in ids])
    return accuracy(sampled, greedy, labels, answers=answers)


def accuracy(
    sampled: Sequence[Rollout],
    greedy: Sequence[Rollout],
    labels: Sequence[str],
    *,
    answers: AnswerKind | str,
) -> dict[str, Any]:
    """[P * samples] sampled and [P] greedy rollouts, prompt by prompt -> accuracy in [0, 1]: `mean`
    of the sampled ones, and `greedy`.

    Also the shares `unparseable`, `timed_out` (in reading the answer or in comparing it) and
    `truncated` of the sampled rollouts, their `tokens_mean`, `samples` and `n`. What timed out is
    not known to be right, and counts as wrong.
    """
    samples = len(sampled) // len(labels)
    asked = [label for label in labels for _ in range(samples)] + list(labels)
    read = extract_many(answers, [rollout.text for rollout in (*sampled, *greedy)])
    grades = grade_many(answers, list(zip(read, asked, strict=True)))
    of_sampled, of_greedy = grades[: len(sampled)], grades[len(sampled) :]
    return {
        "n": len(labels),
        "samples": samples,
        "mean": of_sampled.count(Grade.RIGHT) / len(sampled),
        "greedy": of_greedy.count(Grade.RIGHT) / len(greedy),
        "unparseable": of_sampled.count(Grade.UNPARSEABLE) / len(sampled),
        "timed_out": of_sampled.count(Grade.TIMED_OUT) / len(sampled),
        "truncated": sum(r.truncated for r in sampled) / len(sampled),
        "tokens_mean": sum(len(r.token_ids) for r in sampled) / len(sampled),
    }
