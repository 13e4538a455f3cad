"""Per-route metrics of one training step, a flat dict of floats for verl's own logger.

Contract: pure. Input is the step's records (`agent_loop` writes one a rollout); rows added by
verl to fill a batch are already left out. Names: `pivottrace/<route>/<what>`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from pivottrace_verl.training.groups import DROPPED, NO_VOTE, SOFT


def step_metrics(records: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, float]:
    """Aggregate (uid, record) pairs.

    Per route: `prompts`, `rollouts`, `reward` (mean), `mixed`, `all_right`, `all_wrong` (shares of
    the groups whose rollouts, by the label or the vote, are right in part, all or none; those that
    timed out left out; only mixed groups teach, unless the reward manager adds to the score),
    `agreement`, `weight` (mean over the rollouts), `timed_out` (share of the rollouts whose answer
    could not be compared in time), `pivot_density` (over traced rollouts); for self_train
    `no_vote`, `soft` and `dropped` (shares of the groups, by what became of a vote that was tied or
    weak), and `pseudo_label_accuracy` where labels exist.
    Over all: `pivottrace/capture/{traced,missed}`.
    """
    routes: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    traced = missed = 0
    for uid, record in records:
        routes[record["route"]][uid].append(record)
        traced += bool(record["traced"])
        missed += not record["traced"]
    out: dict[str, float] = {
        "pivottrace/capture/traced": float(traced),
        "pivottrace/capture/missed": float(missed),
    }
    for route, groups in routes.items():
        rows = [row for group in groups.values() for row in group]
        marks = [[r["right"] for r in g if r["right"] is not None] for g in groups.values()]
        # A group of which all timed out is neither.
        low = np.array([min(group, default=np.nan) for group in marks])
        high = np.array([max(group, default=np.nan) for group in marks])
        first = [group[0] for group in groups.values()]
        densities = [row["pivot_density"] for row in rows if row["traced"]]
        known = [row["majority_right"] for row in first if row["majority_right"] is not None]
        values: dict[str, float] = {
            "prompts": float(len(groups)),
            "rollouts": float(len(rows)),
            "reward": float(np.mean([row["reward"] for row in rows])),
            "timed_out": float(np.mean([row["timed_out"] for row in rows])),
            "mixed": float(np.mean(low < high)),
            "all_right": float(np.mean(low == 1)),
            "all_wrong": float(np.mean(high == 0)),
            "agreement": float(np.mean([row["agreement"] for row in first])),
            "weight": float(np.mean([row["weight"] for row in rows])),
        }
        if densities:
            values["pivot_density"] = float(np.mean(densities))
        if known:
            values["pseudo_label_accuracy"] = float(np.mean(known))
        if route == "self_train":
            for name in (NO_VOTE, SOFT, DROPPED):
                values[name] = float(np.mean([row["outcome"] == name for row in first]))
        out.update({f"pivottrace/{route}/{name}": value for name, value in values.items()})
    return out
