"""A plan: the route of every prompt, why, and the settings it was made with.

Contract: three routes (`annotate`, `self_train`, `drop`), each with a reason from the list below.
Pure data; `triage.triage` makes it, `RunDir.write_plan(plan.rows, plan.info())` keeps it.

Axes: P prompts.
"""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from pivottrace_verl.calibration import Curve
from pivottrace_verl.errors import PivotTraceError

AUTO = "auto"
ROUTES = ("annotate", "self_train", "drop")

MASTERED = "mastered"
MASTERED_LABELLED = "mastered; its label was bought already"
TRUSTED = "votes trusted"
LABELLED = "labelled already"
NOT_TRUSTED = "votes not trusted"
UNKNOWN = "uncertainty unknown: no rollout was traced"
OVER_BUDGET = "over budget: votes not trusted"


@dataclass(frozen=True)
class TriageConfig:
    """Thresholds and budget; kept in triage.json."""

    estimator: str = "pivot_density"
    """Which estimator ranks the pool; `auto`: the one that follows the probes' pass rate best."""
    direction: str = AUTO
    """`higher`: high scores are uncertain; `lower`: low ones; `auto`: the probes decide."""
    mastered: float = 0.9
    """Pass rate from which a prompt teaches nothing any more."""
    trusted: float = 0.7
    """Share of right majorities from which votes may stand in for labels."""
    window: float = 0.25
    """Share of the probes in the sliding mean."""
    min_spearman: float = 0.1
    """Least rank correlation, of uncertainty with failure, that is not refused."""
    alpha: float = 0.05
    """Largest p value of that correlation that is not refused; 1 asks for none."""
    budget: int | None = None
    """Labels in total, probes included; None: as many as the thresholds ask for."""
    priority: str = "uncertain"
    """Which prompts a binding budget buys first: the most `uncertain`, as the paper ranks, or those
    nearest the `threshold` of trusted votes, which a weak policy still solves now and then."""
    overflow: str = "drop"
    """Route of the prompts to annotate that the budget leaves out: `drop` or `self_train`."""

    def __post_init__(self) -> None:
        for name in ("mastered", "trusted", "window", "min_spearman", "alpha"):
            value = getattr(self, name)
            if not 0.0 < value <= 1.0:
                raise PivotTraceError(f"The triage's {name} is {value}, but must lie in (0, 1].")
        if self.direction not in (AUTO, "higher", "lower"):
            raise PivotTraceError(
                f"The triage's direction is '{self.direction}', but must be auto, higher or lower."
            )
        if self.priority not in ("uncertain", "threshold"):
            raise PivotTraceError(
                f"The triage's priority is '{self.priority}', but must be uncertain or threshold."
            )
        if self.overflow not in ("drop", "self_train"):
            raise PivotTraceError(
                f"The triage's overflow is '{self.overflow}', but must be drop or self_train."
            )
        if self.budget is not None and self.budget < 0:
            raise PivotTraceError(f"The label budget is {self.budget}, but must not be negative.")


@dataclass(frozen=True)
class Plan:
    """The routes of a pool and how they came about."""

    rows: list[dict[str, Any]]
    """[P] pt_id, route, uncertainty, rank (1 = most uncertain), reason; in the scores' order."""
    estimator: str
    direction: str
    spearman: float
    """Of the uncertainty used with the probes' pass rates; negative."""
    curve: Curve
    table: list[dict[str, Any]]
    labels: dict[str, int | None]
    """budget, bought, to_buy, over_budget."""
    config: TriageConfig

    def counts(self) -> dict[str, int]:
        """Prompts by route."""
        found = Counter(row["route"] for row in self.rows)
        return {route: found[route] for route in ROUTES}

    def to_buy(self) -> list[str]:
        """Prompts to annotate that have no label yet, most uncertain first."""
        rows = [row for row in self.rows if row["reason"] in (NOT_TRUSTED, UNKNOWN)]
        return [row["pt_id"] for row in sorted(rows, key=lambda row: row["rank"])]

    def route_rows(self) -> list[dict[str, Any]]:
        """Print-ready: one row for each route and reason, with prompts and share of the pool."""
        found = Counter((row["route"], row["reason"]) for row in self.rows)
        return [
            {"route": route, "reason": reason, "prompts": n, "share": n / len(self.rows)}
            for (route, reason), n in sorted(
                found.items(), key=lambda item: (ROUTES.index(item[0][0]), -item[1], item[0][1])
            )
        ]

    def info(self) -> dict[str, Any]:
        """All but the rows, JSON-able: the content of triage.json."""
        return {
            "estimator": self.estimator,
            "direction": self.direction,
            "spearman": self.spearman,
            "curve": asdict(self.curve),
            "table": self.table,
            "routes": self.counts(),
            "labels": self.labels,
            "config": asdict(self.config),
        }
