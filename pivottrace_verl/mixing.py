"""Mixing: how much each route's advantages count.

Contract: a factor for each route, at least 0, from the settings and what was observed so far. A
group is one prompt and so one route: under GRPO's normalisation a factor on rewards would cancel,
so it scales advantages.

    mixing = Mixing(MixingConfig(policy="measured"))
    mixing.observe(votes_right=13, votes=20)
    mixing.weights(step)                # {"annotate": 1.0, "self_train": 0.3}

measured: a vote that is right with probability a gives, for answers that are right or wrong, the
expected reward (1 - a) + (2a - 1) r of the true reward r, as labels with symmetric noise do; the
part that teaches is 2a - 1, and a vote that is right half the time teaches nothing. a is the share
of right votes among labelled groups whose vote counts, with weights that fall by `smoothing` a
step: a = sum_k smoothing^k right_k / sum_k smoothing^k votes_k. Before the first such group the
route's weight is 0: a vote that was never measured is not trusted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pivottrace_verl.errors import PivotTraceError

POLICIES = ("constant", "scheduled", "measured")


@dataclass(frozen=True)
class MixingConfig:
    """Factors on the advantages of each route."""

    annotate: float = 1.0
    self_train: float = 1.0
    policy: str = "constant"
    """Of the self_train weight. constant: `self_train`; scheduled: linear from there to
    `self_train_end` over `steps` steps, then constant; measured: `self_train` x max(0, 2a - 1)."""
    self_train_end: float | None = None
    steps: int | None = None
    smoothing: float = 0.9
    """What a step's groups count for one step later, in [0, 1)."""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise PivotTraceError(
                f"The weights' policy is '{self.policy}', but must be one of {', '.join(POLICIES)}."
            )
        for name in ("annotate", "self_train", "self_train_end"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < math.inf:
                raise PivotTraceError(
                    f"The weight {name} is {value}, but must be a number of at least 0."
                )
        if not 0.0 <= self.smoothing < 1.0:
            raise PivotTraceError(
                f"The weights' smoothing is {self.smoothing}, but must lie in [0, 1)."
            )
        scheduled = self.self_train_end is not None and self.steps is not None and self.steps >= 1
        if self.policy == "scheduled" and not scheduled:
            raise PivotTraceError(
                "A scheduled weight needs self_train_end and steps of at least 1, but they are "
                f"{self.self_train_end} and {self.steps}."
            )


class Mixing:
    """The weights, and the running share of right votes behind them."""

    def __init__(self, config: MixingConfig) -> None:
        self._config = config
        self._right = 0.0
        self._votes = 0.0

    def observe(self, votes_right: int, votes: int) -> None:
        """Take in one step: the labelled groups whose vote counts, and how many were right."""
        self._right = self._config.smoothing * self._right + votes_right
        self._votes = self._config.smoothing * self._votes + votes

    def accuracy(self) -> float | None:
        """The smoothed share of right votes, in [0, 1]; None before the first."""
        return self._right / self._votes if self._votes > 0.0 else None

    def weights(self, step: int) -> dict[str, float]:
        """Of each route at a step, counted from 1."""
        config, weight = self._config, self._config.self_train
        if config.policy == "scheduled" and config.self_train_end is not None and config.steps:
            way = min(1.0, (step - 1) / config.steps)
            weight += way * (config.self_train_end - weight)
        elif config.policy == "measured":
            accuracy = self.accuracy()
            weight *= 0.0 if accuracy is None else max(0.0, 2.0 * accuracy - 1.0)
        return {"annotate": config.annotate, "self_train": weight}

    def metrics(self) -> dict[str, float]:
        """The smoothed accuracy, once there is one."""
        accuracy = self.accuracy()
        return {} if accuracy is None else {"mixing/pseudo_label_accuracy": accuracy}

    def state_dict(self) -> dict[str, Any]:
        return {"right": self._right, "votes": self._votes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._right, self._votes = float(state["right"]), float(state["votes"])
