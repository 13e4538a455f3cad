"""The arms of the recipe, and what is kept of each: its learning curve and what it cost.

Contract: an arm differs from the others in which prompts have a label and in who trains (stock verl
or PivotTrace's trainer on the same settings); policy, pool, validation prompts, rollouts, steps and
learning rate are the same. Accuracies are verl's own validation, mean of the samples at T=1.

Axes: V validations of one training run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.report.learning import read_metrics

ACCURACIES = {
    "three": "val-core/countdown/acc/mean@{samples}",
    "two": "val-core/countdown_two/acc/mean@{samples}",
}
"""What verl calls the validation accuracy on problems with three and with two numbers."""

DRAWN = "pivottrace/curriculum/drawn/annotate"


@dataclass(frozen=True)
class Arm:
    """How the labels are spent, and who trains."""

    title: str
    labels: str
    """all, budget or none."""
    triage: bool = False
    """By `pivottrace triage` on probes; without it the labelled prompts are chosen at random."""
    rest: str = "drop"
    """Route of the prompts without a label where there is no triage."""
    stock: bool = False
    """Trained by stock verl in random order, PivotTrace's switch off."""


ARMS = {
    "full": Arm("all labels, stock verl", "all", stock=True),
    "pivottrace": Arm("PivotTrace", "budget", triage=True),
    "random": Arm("random labels, stock verl", "budget", stock=True),
    "votes": Arm("no labels, votes only", "none", rest="self_train"),
}


def curve(
    metrics: Path, steps: int, every: int, samples: int, batch_size: int, labels: dict[str, int]
) -> list[dict[str, Any]]:
    """[V] step, accuracies, and the labels that training had asked for by then, from verl's log.

    A label is asked for when its prompt is first drawn; probes are asked for before training. Draws
    of labelled prompts count as new ones until all labels are used up, so this is never too low.

    Raises PivotTraceError if a validation is missing.
    """
    learning = read_metrics(metrics)
    drawn = dict(learning.get(DRAWN))
    points = []
    for step in range(0, steps + 1, every):
        point: dict[str, Any] = {"step": step}
        for name, key in ACCURACIES.items():
            found = dict(learning.get(key.format(samples=samples)))
            if step not in found:
                raise PivotTraceError(
                    f"{metrics} has no validation {key.format(samples=samples)} at step {step}: "
                    "remove the arm's folder and run the recipe again."
                )
            point[name] = round(found[step], 4)
        # Stock verl has no curriculum to log; all it draws has a label.
        asked = labels["probes"] + int(drawn.get(step, 0 if drawn else step * batch_size))
        point["labels"] = min(labels["bought"], asked)
        points.append(point)
    return points


def final(points: list[dict[str, Any]], name: str = "three") -> float:
    """Mean of the last two validations: one alone is mostly noise."""
    last = [point[name] for point in points[-2:]]
    return sum(last) / len(last)


def reached(curves: list[list[dict[str, Any]]], target: float) -> dict[str, Any] | None:
    """The first validation at which the mean over seeds is at least `target`; None: none is."""
    for points in zip(*curves, strict=True):
        if sum(point["three"] for point in points) / len(points) >= target:
            return {"step": points[0]["step"], "labels": max(point["labels"] for point in points)}
    return None


def finished(file: Path, settings: dict[str, Any]) -> bool:
    """Whether the arm's result is there; PivotTraceError if it was made with other settings."""
    if not file.exists():
        return False
    before = json.loads(file.read_text())["settings"]
    if before != settings:
        changed = ", ".join(
            f"{name}: {before.get(name)} then, {value} now"
            for name, value in settings.items()
            if before.get(name) != value
        )
        raise PivotTraceError(
            f"{file} was made with other settings ({changed}): choose another --out."
        )
    return True


def results(folder: Path) -> list[dict[str, Any]]:
    """The finished arms in `folder`, in the order of `ARMS`, by seed."""
    found = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    return sorted(found, key=lambda row: (list(ARMS).index(row["arm"]), row["seed"]))
