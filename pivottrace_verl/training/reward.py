"""verl's custom reward function: extract the answer, verify it where a label was bought.

Switched on by `reward.custom_reward_function.path=pkg://pivottrace_verl.training.reward`. Runs
once a rollout in verl's reward workers and never sees the rest of the group; the vote is taken in
`agent_loop`. Every row returns the same keys, because verl aggregates them by column.
"""

from __future__ import annotations

from typing import Any

from pivottrace_verl.answers import correct, get_answers


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str | None,
    extra_info: dict[str, Any] | None = None,
    *,
    answers: str = "math",
) -> dict[str, Any]:
    """Score one rollout.

    Returns `score` and `acc` (1.0 right, 0.0 wrong or unknown), `pred` (the extracted answer, ""
    if unparseable) and `parsed` (1.0 or 0.0). Without a ground truth the score is 0.0: the group
    hook replaces it by the vote's.
    """
    kind = get_answers(answers)
    answer = kind.extract(solution_str)
    right = ground_truth is not None and answer is not None and correct(answer, ground_truth, kind)
    return {
        "score": float(right),
        "acc": float(right),
        "pred": answer or "",
        "parsed": float(answer is not None),
    }
