"""Plans that look at no ranking: which prompts get a label is chosen at random, or all do.

    python recipes/grpo_cpu/baseline.py RUN --labels 224 --rest drop --seed 0

Contract: RUN is scored; its plan then labels so many prompts and sends all others to one route, as
`pivottrace triage` would have written it. Neither scores nor labels are looked at.

Axes: P prompts.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import numpy as np

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.plan import TriageConfig
from pivottrace_verl.pool import RunDir

REASON = "baseline: chosen at random"


def plan(run: RunDir, labels: int, rest: str, seed: int) -> None:
    """Write the plan. PivotTraceError if there are fewer prompts than labels."""
    ids = run.pool_table(["pt_id"])["pt_id"].to_pylist()
    if labels > len(ids):
        raise PivotTraceError(
            f"{labels} labels were asked for, but the pool of {run.path} has {len(ids)} prompts."
        )
    place = np.random.default_rng(seed).permutation(len(ids))
    rows = [
        {
            "pt_id": pt_id,
            "route": "annotate" if where < labels else rest,
            "uncertainty": 1 - where / max(1, len(ids) - 1),
            "rank": int(where) + 1,
            "reason": REASON,
        }
        for pt_id, where in zip(ids, place.tolist(), strict=True)
    ]
    config = TriageConfig(budget=labels, priority="random", overflow=rest, seed=seed)
    routes = {"annotate": labels, rest: len(ids) - labels}
    # PivotTrace's trainer asks the plan's settings for the budget.
    run.write_plan(rows, {"routes": routes, "config": asdict(config)})


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--labels", type=int, required=True)
    parser.add_argument("--rest", choices=("drop", "self_train"), default="drop")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        run = RunDir.open(args.run)
        with run.lock():
            plan(run, args.labels, args.rest, args.seed)
    except PivotTraceError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
