"""What a run of the recipe found: summary.json, from the run directory.

Contract: how the policy does is known of the probes alone, whose labels were bought; what is said
of whole tasks (lengths, truncated and unparseable rollouts, routes) needs no label.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from pivottrace_verl.pool import RunDir
from pivottrace_verl.triage import outcomes

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from stages import labels_bought


def summarise(run: RunDir, judged: dict[str, Any], log: dict[str, Any]) -> dict[str, Any]:
    """What the tables show, for machines; `judged` is what `pivottrace estimators --json` says."""
    manifest = run.manifest
    triage = json.loads((run.path / "triage.json").read_text())
    return {
        "pool": manifest["pool"]["n_prompts"],
        "score": manifest["settings"]["score"]["score"],
        "tasks": by_task(run),
        "labels": labels_bought(run.path),
        "routes": triage["routes"],
        "estimator": triage["estimator"],
        "refused": triage.get("refused"),
        "judged": judged,
        "seconds": log["seconds"],
        "seconds_total": round(sum(log["seconds"].values()), 1),
        "peak_memory_gib": log["peak_memory_gib"],
        "versions": manifest["versions"],
    }


def by_task(run: RunDir) -> list[dict[str, Any]]:
    """One row a task, by name. Of its probes: mean pass rate, share of right majorities, and how
    many are solved by no, some or all of their rollouts (`never`, `sometimes`, `always`).
    """
    scores = run.scores(rollouts=False)
    source = {prompt.pt_id: prompt.data_source for prompt in run.pool()}
    probes = set(run.probes()["pt_ids"])
    labels = {pt_id: label for pt_id, label in run.ledger().labels().items() if pt_id in probes}
    judged = outcomes(scores, labels, run.manifest["answers"]["kind"])
    columns = ["pt_id", "n_rollouts", "length_mean", "truncated", "unparseable"]
    records = scores.select(columns).to_pylist()
    plan = run.plan().select(["pt_id", "route"]).to_pylist()
    rows = []
    for task in sorted(set(source.values())):
        of_task = [r for r in records if source[r["pt_id"]] == task]
        seen = [o for o in judged if source[o.pt_id] == task]
        rollouts = sum(r["n_rollouts"] for r in of_task)
        rows.append(
            {
                "task": task,
                "prompts": len(of_task),
                "probes": len(seen),
                "pass_rate": _mean([o.pass_rate for o in seen]),
                "majority_right": _mean([float(o.majority_right) for o in seen]),
                "never": sum(o.pass_rate == 0 for o in seen),
                "sometimes": sum(0 < o.pass_rate < 1 for o in seen),
                "always": sum(o.pass_rate == 1 for o in seen),
                "length_mean": _mean([r["length_mean"] for r in of_task]),
                "truncated": round(sum(r["truncated"] for r in of_task) / rollouts, 4),
                "unparseable": round(sum(r["unparseable"] for r in of_task) / rollouts, 4),
                "routes": dict(Counter(p["route"] for p in plan if source[p["pt_id"]] == task)),
            }
        )
    return rows


def _mean(values: list[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None
