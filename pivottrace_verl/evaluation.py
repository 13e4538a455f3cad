"""Validation accuracy of a model, outside of training: sampled at T=1 and greedy.

The same code and the same seeds before and after training, so the two figures can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pivottrace_verl.answers import correct, get_answers
from pivottrace_verl.generation import Engine, Request


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
) -> dict[str, Any]:
    """Accuracy in [0, 1]: `mean` over `samples` rollouts a prompt at temperature 1, and `greedy`.

    Also `unparseable` and `truncated` shares of the sampled rollouts, `tokens_mean` and `n`.
    """
    kind = get_answers(answers)
    with Engine(model, max_prompt_tokens=max_prompt_tokens, max_tokens=max_tokens) as engine:
        ids = [engine.chat_ids(messages) for messages in prompts]
        sampled = engine.generate(
            [
                Request(prompt, seed=seed * 1_000_003 + index * samples + sample)
                for index, prompt in enumerate(ids)
                for sample in range(samples)
            ]
        )
        greedy = engine.generate([Request(prompt, seed=0, temperature=0.0) for prompt in ids])

    def right(text: str, label: str) -> bool:
        answer = kind.extract(text)
        return answer is not None and correct(answer, label, kind)

    repeated = [label for label in labels for _ in range(samples)]
    hits = [right(r.text, label) for r, label in zip(sampled, repeated, strict=True)]
    greedy_hits = [right(r.text, label) for r, label in zip(greedy, labels, strict=True)]
    return {
        "n": len(labels),
        "samples": samples,
        "mean": sum(hits) / len(hits),
        "greedy": sum(greedy_hits) / len(greedy_hits),
        "unparseable": sum(kind.extract(r.text) is None for r in sampled) / len(sampled),
        "truncated": sum(r.truncated for r in sampled) / len(sampled),
        "tokens_mean": sum(len(r.token_ids) for r in sampled) / len(sampled),
    }
