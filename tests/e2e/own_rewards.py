"""Reward functions that a recipe of verl's might bring."""

from typing import Any

from pivottrace_verl.training.reward import compute_score


def bare(
    data_source: str, solution_str: str, ground_truth: str | None, extra_info: Any = None
) -> float:
    """A score and nothing else."""
    found = compute_score(data_source, solution_str, ground_truth, answers="expression")
    return float(found["score"])


def needs_a_label(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None
) -> float:
    """Written for prompts that all have one."""
    return float(ground_truth.strip() in solution_str)
