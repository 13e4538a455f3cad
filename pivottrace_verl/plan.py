"""A plan: the route of every prompt, why, and the settings it was made with.

Contract: four routes (`annotate`, `self_train`, `drop`, `review`), each with a reason from the list
below. Pure data; `triage.triage` makes it, `RunDir.write_plan(plan.rows, plan.info())` keeps it.

Axes: P prompts.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pivottrace_verl.calibration import Curve
from pivottrace_verl.errors import PivotTraceError

AUTO = "auto"
ROUTES = ("annotate", "self_train", "drop", "review")
PRIORITIES = ("uncertain", "threshold", "cheapest", "random")

MASTERED = "mastered"
MASTERED_LABELLED = "mastered; its label was bought already"
TRUSTED = "votes trusted"
LABELLED = "labelled already"
NOT_TRUSTED = "votes not trusted"
UNKNOWN = "uncertainty unknown: no rollout was traced"
OVER_BUDGET = "over budget: votes not trusted"
OVER_BUDGET_UNKNOWN = "over budget: uncertainty unknown"
OVER_QUOTA = "over its source's quota: votes not trusted"
OVER_QUOTA_UNKNOWN = "over its source's quota: uncertainty unknown"
TRUNCATED = "broken: too many rollouts truncated"
UNPARSEABLE = "broken: too many rollouts unparseable"
TIMED_OUT = "broken: too many answers timed out"

TO_BUY = (NOT_TRUSTED, UNKNOWN)
ROUTE_OF = {
    MASTERED: "drop",
    MASTERED_LABELLED: "drop",
    TRUSTED: "self_train",
    LABELLED: "annotate",
    NOT_TRUSTED: "annotate",
    UNKNOWN: "annotate",
    OVER_BUDGET: "overflow",
    OVER_BUDGET_UNKNOWN: "overflow",
    OVER_QUOTA: "overflow",
    OVER_QUOTA_UNKNOWN: "overflow",
    TRUNCATED: "review",
    UNPARSEABLE: "review",
    TIMED_OUT: "review",
}
"""Every reason and the route it gives; `overflow` stands for the route of that setting."""


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
    budget_cost: float | None = None
    """The same in units of cost: what the ledger has spent and what the plan will."""
    quotas: Mapping[str, int] = field(default_factory=dict)
    """Data source -> most labels in total, bought ones included."""
    floors: Mapping[str, int] = field(default_factory=dict)
    """Data source -> labels in total that are bought before all else, bought ones included."""
    priority: str = "uncertain"
    """Which prompts a binding budget buys first: the most `uncertain`, as the paper ranks; those
    nearest the `threshold` of trusted votes, which a weak policy still solves now and then; the
    most uncertainty for its cost (`cheapest`); or `random`, the baseline that counts."""
    overflow: str = "drop"
    """Route of the prompts to annotate that the budget leaves out: `drop` or `self_train`."""
    max_unanswered: float = 0.5
    """A prompt is broken if more than this share of its rollouts is unparseable or timed out."""
    max_truncated: float = 0.5
    """The same for truncated rollouts, whether or not an answer could be read: a text that was cut
    off gives the wrong length, entropy and pivots, and often an answer from half-way."""
    draws: int = 400
    """Bootstrap draws behind the intervals."""
    seed: int = 0
    """Of the bootstrap and of the random priority."""

    def __post_init__(self) -> None:
        for name in ("mastered", "trusted", "window", "min_spearman", "alpha"):
            value = getattr(self, name)
            if not 0.0 < value <= 1.0:
                raise PivotTraceError(f"The triage's {name} is {value}, but must lie in (0, 1].")
        for name in ("max_unanswered", "max_truncated"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise PivotTraceError(f"The triage's {name} is {value}, but must lie in [0, 1].")
        for name, allowed in (
            ("direction", (AUTO, "higher", "lower")),
            ("priority", PRIORITIES),
            ("overflow", ("drop", "self_train")),
        ):
            if getattr(self, name) not in allowed:
                raise PivotTraceError(
                    f"The triage's {name} is '{getattr(self, name)}', but must be "
                    f"{', '.join(allowed[:-1])} or {allowed[-1]}."
                )
        if self.draws < 1 or self.seed < 0:
            raise PivotTraceError(
                f"The triage has {self.draws} bootstrap draws and the seed {self.seed}, but needs "
                "at least 1 draw and a seed that is not negative."
            )
        self._check_budget()

    def _check_budget(self) -> None:
        if self.budget is not None and self.budget < 0:
            raise PivotTraceError(f"The label budget is {self.budget}, but must not be negative.")
        if self.budget_cost is not None and not 0.0 <= self.budget_cost < math.inf:
            raise PivotTraceError(
                f"The budget of costs is {self.budget_cost}, but must be a number that is not "
                "negative."
            )
        if self.budget is not None and self.budget_cost is not None:
            raise PivotTraceError(
                f"A budget of {self.budget} labels and one of {self.budget_cost:g} in cost were "
                "given, but only one of them can bind."
            )
        for what, numbers in (("quota", self.quotas), ("floor", self.floors)):
            for source, n in numbers.items():
                if n < 0:
                    raise PivotTraceError(
                        f"The {what} of the source '{source}' is {n}, but must not be negative."
                    )
        for source, floor in self.floors.items():
            if floor > self.quotas.get(source, floor):
                raise PivotTraceError(
                    f"The source '{source}' has a floor of {floor} labels, more than its quota of "
                    f"{self.quotas[source]}."
                )
        asked = sum(self.floors.values())
        if self.budget is not None and asked > self.budget:
            raise PivotTraceError(
                f"The floors of the sources add up to {asked} labels, more than the budget of "
                f"{self.budget}."
            )


@dataclass(frozen=True)
class Plan:
    """The routes of a pool and how they came about."""

    rows: pa.Table
    """[P] pt_id, route, uncertainty, rank (1 = most uncertain), reason, cost; in the scores'
    order, columns of `schemas.PLAN_SCHEMA`."""
    estimator: str
    direction: str
    spearman: float
    """Of the uncertainty used with the probes' pass rates; negative."""
    curve: Curve
    table: list[dict[str, Any]]
    """How every estimator did on the probes."""
    labels: dict[str, Any]
    """Labels: budget, bought, to_buy, over_budget, over_quota. Costs: budget_cost, spent,
    cost_to_buy. probes_in_review: labels bought as probes whose prompts are broken."""
    sources: list[dict[str, Any]]
    """One row a data source, where quotas or floors look at them: source, quota, floor, bought,
    to_buy, left_out."""
    notes: list[str]
    """What the budget could not do as asked, a sentence each."""
    config: TriageConfig

    def counts(self) -> dict[str, int]:
        """Prompts by route."""
        found = _counted(self.rows["route"])
        return {route: found[route] for route in ROUTES}

    def to_buy(self) -> list[str]:
        """Prompts to annotate that have no label yet, most uncertain first."""
        wanted = pc.is_in(self.rows["reason"], value_set=pa.array(TO_BUY))
        rows = self.rows.select(["pt_id", "rank"]).filter(wanted)
        return list(rows.sort_by("rank")["pt_id"].to_pylist())

    def route_rows(self) -> list[dict[str, Any]]:
        """Print-ready: one row for each route and reason, with prompts and share of the pool."""
        pairs = self.rows.select(["route", "reason"]).group_by(["route", "reason"])
        found = pairs.aggregate([([], "count_all")]).to_pylist()
        found.sort(key=lambda r: (ROUTES.index(r["route"]), -r["count_all"], r["reason"]))
        return [
            {
                "route": row["route"],
                "reason": row["reason"],
                "prompts": row["count_all"],
                "share": row["count_all"] / self.rows.num_rows,
            }
            for row in found
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
            "sources": self.sources,
            "notes": self.notes,
            "config": asdict(self.config),
        }


def _counted(column: pa.ChunkedArray) -> Counter[str]:
    return Counter(
        {entry["values"]: entry["counts"] for entry in column.value_counts().to_pylist()}
    )
