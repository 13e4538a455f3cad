"""verl's custom reward function: extract the answer, verify it where a label was bought.

Switched on by `reward.custom_reward_function.path=pkg://pivottrace_verl.training.reward`. Runs
once a rollout in verl's reward workers and never sees the rest of the group; the vote is taken in
`agent_loop`, which also says what a function in its place should return. Every row returns the same
keys, because verl aggregates them by column.
"""

from __future__ import annotations

from typing import Any

from pivottrace_verl.answers import TIMED_OUT, Grade, extract_many, get_answers, grade


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
    if there is none), `parsed` and `timed_out` (1.0 or 0.0; what timed out is neither right nor
    wrong, and has no vote). Without a ground truth the score is 0.0: the group hook replaces it by
    the vote's.
    """
    kind = get_answers(answers)
    answer = extract_many(kind, [solution_str])[0]
    timed_out, right = answer is TIMED_OUT, False
    if ground_truth is not None:
        found = grade(answer, ground_truth, kind)
        timed_out, right = found is Grade.TIMED_OUT, found is Grade.RIGHT
    return {
        "score": float(right),
        "acc": float(right),
        "pred": answer if isinstance(answer, str) else "",
        "parsed": float(isinstance(answer, str)),
        "timed_out": float(timed_out),
    }
