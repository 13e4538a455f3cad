"""Guards: is the policy agreeing with itself more while it is right less?

Contract: one line of gauges a step, and one rule over a window of them. Votes reward agreement, so
a policy that collapses agrees more and more on answers that are wrong more and more (arXiv
2603.08660: intrinsic rewards rise, then fall). Only labelled prompts can tell: without any in a
step there is no verdict. A verdict is never silent: it comes with a sentence, and the number of
verdicts so far is a metric.

The rule: of the latest `window` steps that had both, the agreement of self_train groups is
higher in the later half by at least `change`, and the share of right answers among labelled groups
is lower by at least `change`; both by more than two standard errors of the halves' means. After a
verdict the window begins anew.

Like with like: re-triage takes prompts that agree little out of self_train, and some come back
labelled and hard; both means would move though the policy did not. So only prompts count whose
route, label and rest have not changed since the window's first step, in its earlier half as in its
later one. A collapse shows on those that stay, however often the others move. What is not told
apart: in an order by uncertainty with a bounded share, a route that begins again goes from its last
prompts to its first, and its mean with it; there, look at the gauges before you believe a verdict.

    guard = Guard(GuardConfig())
    verdict = guard.observe(step, groups, gauge, since)       # None, or a sentence
    guard.factor                                 # what the self_train weight is multiplied by

Axes: N prompts of a step or a window.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.observed import Observed

ACTIONS = ("lower", "stop", "off")

Since = Callable[[Sequence[str]], Sequence[int]]
"""[N] pt_ids -> [N] the first step of each prompt's present route, label and rest."""


@dataclass(frozen=True)
class GuardConfig:
    """The collapse rule."""

    action: str = "lower"
    """lower: the self_train weight is multiplied by `factor` at every verdict, for good; stop:
    training ends with the sentence; off: gauges only."""
    window: int = 20
    """Steps that are looked at; an even number of at least 4."""
    change: float = 0.05
    """Least rise of the agreement and fall of the accuracy, in (0, 1]."""
    factor: float = 0.5
    """In [0, 1)."""

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise PivotTraceError(
                f"The guard's action is '{self.action}', but must be one of {', '.join(ACTIONS)}."
            )
        if self.window < 4 or self.window % 2:
            raise PivotTraceError(
                f"The guard's window is {self.window} steps, but must be an even number of at "
                "least 4."
            )
        if not 0.0 < self.change <= 1.0 or not 0.0 <= self.factor < 1.0:
            raise PivotTraceError(
                f"The guard's change is {self.change} and its factor {self.factor}, but they must "
                "lie in (0, 1] and [0, 1)."
            )


@dataclass(frozen=True)
class _Step:
    """What a step showed, prompt by prompt; some may be there twice."""

    step: int
    agreement: list[tuple[str, float]]
    """Of self_train groups."""
    accuracy: list[tuple[str, float]]
    """Of labelled groups."""


class Guard:
    """The gauges of a run."""

    def __init__(self, config: GuardConfig) -> None:
        self._config = config
        self._seen: list[_Step] = []
        """The latest steps that had both."""
        self._verdicts = 0
        self._last: dict[str, float] = {}

    @property
    def factor(self) -> float:
        """On the self_train weight, in [0, 1]."""
        lowered = self._config.action == "lower"
        return float(self._config.factor**self._verdicts) if lowered else 1.0

    def observe(
        self,
        step: int,
        groups: Sequence[Observed],
        gauge: Callable[[Observed], bool],
        since: Since,
    ) -> str | None:
        """Take in one step. `gauge` says of a labelled group whether it stands for those without a
        label. Returns the sentence of a verdict; raises it if the action is `stop`."""
        voted = [group for group in groups if group.route == "self_train"]
        known = [group for group in groups if group.labeled]
        gauged = [group for group in known if gauge(group) and group.votes]
        self._last = _means(
            {
                "agreement": [group.agreement for group in voted],
                "answer_entropy": [group.answer_entropy for group in voted],
                "length": [group.n_tokens for group in groups],
                "probe_accuracy": [group.pass_rate or 0.0 for group in known],
                "pseudo_label_accuracy": [float(bool(g.majority_right)) for g in gauged],
            }
        )
        if voted and known:
            agreement = [(group.pt_id, group.agreement) for group in voted]
            accuracy = [(group.pt_id, group.pass_rate or 0.0) for group in known]
            self._seen.append(_Step(step, agreement, accuracy))
            self._seen = self._seen[-self._config.window :]
        sentence = self._judge(since) if self._config.action != "off" else None
        if sentence is None:
            return None
        self._seen = []
        self._verdicts += 1
        if self._config.action == "stop":
            raise PivotTraceError(
                f"Training stops: {sentence}; go on from the last checkpoint with a lower "
                "pivottrace.weights.self_train, a higher pivottrace.vote.min_agreement or more "
                "labels."
            )
        return f"{sentence}: the self_train weight is multiplied by {self.factor:g} from now on."

    def _judge(self, since: Since) -> str | None:
        half = self._config.window // 2
        if len(self._seen) < self._config.window:
            return None
        ids = {i for step in self._seen for i, _ in (*step.agreement, *step.accuracy)}
        moved = dict(zip(ids, since(list(ids)), strict=True))
        stayed = {i for i, first in moved.items() if first <= self._seen[0].step}
        earlier, later = (
            [_means_over(stayed, step) for step in steps]
            for steps in (self._seen[:half], self._seen[half:])
        )
        rise = _difference(*([a for a, _ in steps if a is not None] for steps in (earlier, later)))
        fall = _difference(*([b for _, b in steps if b is not None] for steps in (later, earlier)))
        if rise is None or fall is None:
            return None
        if min(rise[0], fall[0]) < self._config.change or rise[1] <= 2.0 or fall[1] <= 2.0:
            return None
        return (
            f"over the last {self._config.window} steps the agreement of the votes rose by "
            f"{rise[0]:.2f} while the accuracy on labelled prompts fell by {fall[0]:.2f}, as it "
            "does when a policy collapses onto its own answers"
        )

    def metrics(self) -> dict[str, float]:
        """Flat floats under `guard/`: the latest gauges, verdicts so far, the factor."""
        return {
            **{f"guard/{name}": value for name, value in self._last.items()},
            "guard/verdicts": float(self._verdicts),
            "guard/factor": self.factor,
        }

    def state_dict(self) -> dict[str, Any]:
        seen = [[step.step, step.agreement, step.accuracy] for step in self._seen]
        return {"seen": seen, "verdicts": self._verdicts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seen = [
            _Step(int(step), *([(str(i), float(x)) for i, x in pairs] for pairs in columns))
            for step, *columns in state["seen"]
        ]
        self._verdicts = int(state["verdicts"])


def _means(columns: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.fmean(values) for name, values in columns.items() if values}


def _means_over(stayed: Collection[str], step: _Step) -> tuple[float | None, float | None]:
    """Mean agreement and accuracy of the step over the prompts that stayed; None of none."""
    agreement, accuracy = (
        [x for i, x in pairs if i in stayed] for pairs in (step.agreement, step.accuracy)
    )
    return (
        statistics.fmean(agreement) if agreement else None,
        statistics.fmean(accuracy) if accuracy else None,
    )


def _difference(earlier: Sequence[float], later: Sequence[float]) -> tuple[float, float] | None:
    """How much the mean rose, and that in standard errors; None of fewer than two steps a half."""
    if min(len(earlier), len(later)) < 2:
        return None
    rise = statistics.fmean(later) - statistics.fmean(earlier)
    error = math.sqrt(sum(statistics.variance(half) / len(half) for half in (earlier, later)))
    return rise, rise / error if error > 0.0 else math.copysign(math.inf, rise)
