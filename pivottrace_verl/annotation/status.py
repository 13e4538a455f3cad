"""Where annotation stands: bought, by whom, in which round, what is open, what is in conflict.

Contract: read-only, from the ledger, the plan and conflicts.json. Costs are in the unit of the
imports.
"""

from collections import defaultdict
from typing import Any

from pivottrace_verl.annotation import conflicts
from pivottrace_verl.annotation.queue import waiting
from pivottrace_verl.pool import RunDir


def status(run: RunDir) -> dict[str, Any]:
    """JSON-able.

    bought, cost; rounds [{round, labels, probes, cost}]; annotators [{annotator, annotations,
    cost}], each paid for their part of a label that several settled; several: labels of several
    annotators, differed: those of them that they did not agree on letter by letter; open {probes,
    queue}, None where none are drawn or planned; budget, budget_cost of the plan; conflicts.
    """
    ledger = run.ledger()
    entries = ledger.entries()
    rounds: dict[int, dict[str, Any]] = {}
    annotators: dict[str, list[float]] = defaultdict(list)
    shared = [entry["annotations"] for entry in entries if entry.get("annotations")]
    for entry in entries:
        number = entry.get("round", 1)
        row = rounds.setdefault(number, {"round": number, "labels": 0, "probes": 0, "cost": 0.0})
        row["labels"] += 1
        row["probes"] += entry["purpose"] == "probe"
        row["cost"] += entry["cost"]
        for part in entry.get("annotations") or [entry]:
            annotators[part["annotator"]].append(part["cost"])
    planned = (run.path / "plan.parquet").exists()
    budget = run.triage().get("labels", {}) if planned else {}
    drawn = (run.path / "probes.json").exists()
    return {
        "bought": len(ledger.labels()),
        "cost": ledger.spent(),
        "rounds": [rounds[number] for number in sorted(rounds)],
        "annotators": [
            {"annotator": name, "annotations": len(costs), "cost": float(sum(costs))}
            for name, costs in sorted(annotators.items())
        ],
        "several": len(shared),
        "differed": sum(len({part["label"] for part in parts}) > 1 for parts in shared),
        "open": {
            "probes": len(waiting(run, "probes")) if drawn else None,
            "queue": len(waiting(run, "queue")) if planned else None,
        },
        "budget": budget.get("budget"),
        "budget_cost": budget.get("budget_cost"),
        "conflicts": conflicts.still_open(run),
    }
