"""Does the choice of prompts matter here? The quickstart's policy and pool under other plans.

    python recipes/quickstart/compare.py --base runs/quickstart --out runs/compare --seeds 0 1

Every arm goes through all stages again, from scores and probes on, in a run directory of its own
and differs in how triage spends the budget only; a seed moves training, not scores or probes.
Killed, it goes on where it was; summary.json holds the arms that are done.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from run import FULL, LABEL_SHARE, plan, score
from stages import Stages, labels_bought, write_json

ARMS: dict[str, tuple[float, list[str]]] = {
    "most uncertain first": (LABEL_SHARE, ["--priority", "uncertain"]),
    "random": (LABEL_SHARE, ["--priority", "random"]),
    "nearest to the threshold": (LABEL_SHARE, ["--priority", "threshold"]),
    "all prompts": (1.0, []),
}
"""Arm -> (share of the pool that may be labelled, how the budget is spent)."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=Path("runs/quickstart"), help="a finished one")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    args = parser.parse_args()
    console = Console(highlight=False)
    os.environ.setdefault("VERL_PLATFORM", "cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    before = json.loads((args.base / "validation.json").read_text())["before"]
    for seed in args.seeds:
        for arm in args.arms:
            run_arm(console, args.base, args.out / f"{arm.replace(' ', '-')}-{seed}", arm, seed)
            write_json(args.out / "summary.json", summary(args.out, before))


def run_arm(console: Console, base: Path, run: Path, arm: str, seed: int) -> None:
    """One arm with one seed, from the base's policy and pool to its validation accuracy."""
    pivottrace, data = Path(sys.executable).with_name("pivottrace"), base / "data"
    run.mkdir(exist_ok=True)
    stage = Stages(run / "stages.json", console)
    share, how = ARMS[arm]
    score(stage, pivottrace, run, base / "policy", data, FULL, "0")
    plan(stage, pivottrace, run, data, FULL, "0", share, how)
    stage(
        "train", pivottrace, "train", run, "--seed", seed, *FULL["train"],
        "trainer.val_before_train=False", "trainer.test_freq=-1",
    )  # fmt: skip
    stage("validate", pivottrace, "evaluate", run, "after", "--samples", FULL["val_samples"])
    labels, triage = labels_bought(run), json.loads((run / "triage.json").read_text())
    after = json.loads((run / "validation.json").read_text())["after"]
    write_json(
        run / "arm.json",
        {
            "arm": arm,
            "seed": seed,
            "labels": labels["bought"],
            "share": labels["share"],
            "routes": triage["routes"],
            **{name: after[name] for name in ("mean", "greedy")},
        },
    )


def summary(out: Path, before: dict[str, Any]) -> dict[str, Any]:
    """The arms that are done, in the order of `ARMS`."""
    found = [json.loads(file.read_text()) for file in sorted(out.glob("*/arm.json"))]
    found.sort(key=lambda row: (list(ARMS).index(row["arm"]), row["seed"]))
    return {"before": {name: before[name] for name in ("mean", "greedy")}, "arms": found}


if __name__ == "__main__":
    main()
