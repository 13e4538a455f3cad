"""Makes the pool of three reasoning-gym tasks, and the answers that only the oracle may read.

    python recipes/smollm2/make_pool.py --out runs/smollm2/data [--per-task 88] [--seed 0]

Contract: `pool.jsonl` holds distinct prompts in verl's columns without any answer, `answers.jsonl`
their labels by `pt_id`; the tasks take turns in a shuffled order, and the same arguments give the
same bytes. All labels are numbers: a run has one answers kind, and `last_number` does for all.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import reasoning_gym

from pivottrace_verl.files import write_bytes_atomic
from pivottrace_verl.prompts import pt_id


@dataclass(frozen=True)
class Task:
    """A generator of reasoning-gym and how this model is asked."""

    settings: dict[str, Any]
    """Easy ones: this model is to be right now and then."""
    question: str
    """A worked example, in the task's own words, which stands before every question."""
    worked: str
    """How it is answered: step by step, the answer last."""


TASKS = {
    "chain_sum": Task(
        {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        "State the final answer to the following arithmetic problem: 3 + 6 =",
        "3 + 6 = 9. The answer is 9.",
    ),
    "products": Task(
        {"min_digits": 1, "max_digits": 1},
        "Solve the following multiplication: 3 * 4. Give only the result as your final answer.",
        "3 * 4 is 4 + 4 + 4 = 12. The answer is 12.",
    ),
    "simple_equations": Task(
        {
            "min_terms": 2,
            "max_terms": 2,
            "min_value": 1,
            "max_value": 10,
            "operators": ("+", "-"),
            "operators_weights": (0.5, 0.5),
        },
        "Solve for x: x + 3 = 11",
        "x = 11 - 3 = 8. The answer is 8.",
    ),
}

TRIES = 20
"""Entries asked of a generator for each one wanted: easy settings repeat themselves."""


def draw(task: str, n: int, seed: int) -> list[tuple[str, str]]:
    """`n` distinct (question, answer), without the worked example; SystemExit if the generator did
    not yield as many."""
    # Neighbouring seeds of reasoning-gym share all entries but one.
    data = reasoning_gym.create_dataset(
        task, size=TRIES * n, seed=1_000_003 * (seed + 1), **TASKS[task].settings
    )
    found: dict[str, str] = {}
    for i in range(TRIES * n):
        if len(found) == n:
            break
        question = data[i]["question"].strip()
        if question != TASKS[task].question:
            found.setdefault(question, data[i]["answer"])
    if len(found) < n:
        raise SystemExit(f"error: {task} gave {len(found)} distinct prompts, not {n}.")
    return list(found.items())


def messages(task: Task, question: str) -> list[dict[str, str]]:
    """The chat: the worked example, then the question."""
    said = (("user", task.question), ("assistant", task.worked), ("user", question))
    return [{"role": role, "content": content} for role, content in said]


def make(out: Path, per_task: int, seed: int) -> None:
    """The two files in `out`, each written whole."""
    drawn = [(task, *pair) for task in TASKS for pair in draw(task, per_task, seed)]
    # The detector's thresholds come from the first rollouts: they are to be of all tasks.
    random.Random(seed).shuffle(drawn)
    pool, answers = [], []
    for task, question, answer in drawn:
        prompt = messages(TASKS[task], question)
        pool.append({"prompt": prompt, "data_source": task})
        answers.append({"pt_id": pt_id(prompt, task), "label": answer})
    _write(out / "pool.jsonl", pool)
    _write(out / "answers.jsonl", answers)
    print(f"wrote {out}: {len(pool)} prompts of {', '.join(TASKS)}")


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    write_bytes_atomic(path, text.encode())


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--per-task", type=int, default=88)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    make(args.out, args.per_task, args.seed)


if __name__ == "__main__":
    main()
