"""Records of a training step for tests, as the agent loop leaves one a rollout."""

from typing import Any


def record(pt_id: str, labeled: bool = True, **more: Any) -> dict[str, Any]:
    """A traced rollout that was right, of the route that goes with its label; `more` replaces what
    is there, and whether it was right follows its reward."""
    reward = more.get("reward", 1.0)
    return {
        "pt_id": pt_id,
        "route": "annotate" if labeled else "self_train",
        "labeled": labeled,
        "weight": 1.0,
        "reward": reward,
        "right": None if more.get("timed_out") else reward,
        "outcome": "verified" if labeled else "voted",
        "timed_out": False,
        "agreement": 0.75,
        "answer_entropy": 0.5,
        "majority_right": True if labeled else None,
        "votes": True,
        "n_tokens": 10,
        "traced": True,
        "pivots": 2,
        "pivot_density": 0.2,
        "entropy": 1.0,
        "logprob": -0.5,
        "vote_s": 0.001,
        **more,
    }
