"""Countdown with two numbers: what the recipe's policy masters, beside three, which it does not.

Contract: a problem has one solution, as for three numbers (`recipes/quickstart/tasks.py`). The
policy is taught all of them, so none is held out: a mastered prompt is one whose like was seen.

Axes: none; one problem at a time.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))
import tasks


def problems(seed: int) -> list[tasks.Instance]:
    """All of them, in random order, and the numbers of each, too."""
    rng = random.Random(seed)
    pairs = [(a, b) for a in range(1, tasks.MAX_VALUE + 1) for b in range(a, tasks.MAX_VALUE + 1)]
    found = [
        tasks.Instance((a, b) if rng.random() < 0.5 else (b, a), step.value)
        for a, b in pairs
        for step in tasks.steps(a, b)
        if len(tasks.solutions((a, b)).get(step.value, ())) == 1
    ]
    rng.shuffle(found)
    return found


def worked_solution(problem: tasks.Instance) -> str:
    """The one combination that hits the target, written as the search for three numbers is."""
    step = next(step for step in tasks.steps(*problem.numbers) if step.value == problem.target)
    return f"{step} yes <answer> {step.left} {step.op} {step.right} </answer>"
