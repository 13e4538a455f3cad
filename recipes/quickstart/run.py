"""The quickstart: a model, a pool, and every stage of PivotTrace on one CPU machine.

    make quickstart        (or: python recipes/quickstart/run.py --run runs/quickstart)

Each stage is the command a user would type, run as a process of its own; a stage that is done is
not run again, so a killed quickstart goes on where it was. Ends with a table and summary.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from stages import PeakMemory, Stages, annotate, labels_bought, write_json

HERE = Path(__file__).resolve().parent
LABEL_SHARE = 0.35
"""Most of the pool that may be labelled, probes included."""

# fmt: off
FULL = {
    "policy": [],
    "pool": ["--n-pool", "640", "--n-val", "200"],
    "score": ["--rollouts", "8"],
    "probes": 64,
    # The method's own estimator first; if the probes do not confirm it, the one they recommend:
    # --fallback says which and why. 0.25: what chance alone reaches once in 20 times on 64 probes.
    "triage": ["--fallback", "--min-spearman", "0.25"],
    "train": [
        # One update a step: smaller batches of so few rewarded rollouts are mostly noise. The rate
        # falls to zero, because what these few prompts teach is learnt in the first half.
        "--steps", "32", "--batch-size", "32", "--rollouts", "8", "--learning-rate", "1e-3",
        "actor_rollout_ref.actor.optim.lr_scheduler_type=cosine", "trainer.test_freq=16",
    ],
    "val_samples": 4,
}
# The end-to-end test: the same stages, real engines, a few minutes.
SMALL = {
    "policy": ["--small"],
    "pool": ["--n-pool", "96", "--n-val", "24"],
    "score": ["--rollouts", "8", "--part-size", "32"],
    "probes": 32,
    # A model of half a minute gives no ranking worth the name; both routes must be trained on.
    "triage": ["--min-spearman", "1e-6", "--alpha", "1", "--overflow", "self_train"],
    "train": [
        "--steps", "3", "--batch-size", "8", "--rollouts", "4", "--learning-rate", "3e-4",
        "--val-samples", "1",
    ],
    "val_samples": 2,
}
# fmt: on
MAX_PROMPT_TOKENS = "64"
MAX_TOKENS = "128"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--small", action="store_true", help="the end-to-end test's size")
    parser.add_argument("--seed", default="0")
    args = parser.parse_args()
    size = SMALL if args.small else FULL
    console = Console(highlight=False)
    os.environ.setdefault("VERL_PLATFORM", "cpu")
    run: Path = args.run
    run.mkdir(parents=True, exist_ok=True)
    memory = PeakMemory()
    memory.start()
    python, pivottrace = sys.executable, Path(sys.executable).with_name("pivottrace")
    stage = Stages(run / "quickstart.json", console)

    policy, data = run / "policy", run / "data"
    stage("policy", python, HERE / "make_policy.py", "--out", policy, *size["policy"])
    stage("pool", python, HERE / "make_pool.py", "--out", data, *size["pool"])
    score(stage, pivottrace, run, policy, data, size, args.seed)
    evaluate(stage, pivottrace, run, "before", size)
    plan(stage, pivottrace, run, data, size, args.seed, LABEL_SHARE)
    stage("train", pivottrace, "train", run, "--seed", args.seed, *size["train"])
    evaluate(stage, pivottrace, run, "after", size)
    stage.note_peak(memory)
    write_summary(run, stage.log)
    stage("report", pivottrace, "report", run)
    show(console, run)


def score(
    stage: Stages,
    pivottrace: Path,
    run: Path,
    policy: Path,
    data: Path,
    size: dict[str, Any],
    seed: str,
) -> None:
    """A run directory of the pool, scored."""
    stage(
        "init", pivottrace, "init", run, "--pool", data / "pool.jsonl", "--model", policy,
        "--val", data / "val.jsonl", "--answers", "expression",
    )  # fmt: skip
    stage(
        "score", pivottrace, "score", run, *size["score"], "--seed", seed,
        "--max-prompt-tokens", MAX_PROMPT_TOKENS, "--max-tokens", MAX_TOKENS,
    )  # fmt: skip


def plan(
    stage: Stages,
    pivottrace: Path,
    run: Path,
    data: Path,
    size: dict[str, Any],
    seed: str,
    share: float,
    how: Sequence[str] = (),
) -> None:
    """Probes, routes and labels: at most `share` of the pool, spent as `how` tells triage."""
    stage("probe", pivottrace, "probe", run, "--n", size["probes"], "--seed", seed)
    annotate(stage, pivottrace, run, data, "probes")
    n_pool = sum(1 for _ in (data / "pool.jsonl").open())
    budget = str(int(share * n_pool))
    stage("triage", pivottrace, "triage", run, "--budget", budget, *size["triage"], *how)
    annotate(stage, pivottrace, run, data, "queue")


def evaluate(stage: Stages, pivottrace: Path, run: Path, when: str, size: dict[str, Any]) -> None:
    stage(f"validate {when}", pivottrace, "evaluate", run, when, "--samples", size["val_samples"])


def write_summary(run: Path, log: dict[str, Any]) -> None:
    """summary.json: what the table shows, for machines."""
    manifest = json.loads((run / "manifest.json").read_text())
    triage = json.loads((run / "triage.json").read_text())
    done = json.loads((run / "train" / "done.json").read_text())
    validation = json.loads((run / "validation.json").read_text())
    summary = {
        "pool": manifest["pool"]["n_prompts"],
        "labels": labels_bought(run),
        "routes": triage["routes"],
        "estimator": triage["estimator"],
        "refused": triage.get("refused"),
        "estimators": triage["table"],
        "steps": done["steps"],
        "validation": {
            when: {name: value for name, value in found.items() if name != "made_from"}
            for when, found in validation.items()
        },
        "seconds": log["seconds"],
        "seconds_total": round(sum(log["seconds"].values()), 1),
        "peak_memory_gib": log["peak_memory_gib"],
        "versions": manifest["versions"],
    }
    write_json(run / "summary.json", summary)


def show(console: Console, run: Path) -> None:
    """The closing table."""
    summary = json.loads((run / "summary.json").read_text())
    before, after = (summary["validation"][when] for when in ("before", "after"))
    table = Table(title="PivotTrace quickstart", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    labels = summary["labels"]
    table.add_row("pool", f"{summary['pool']} prompts without labels")
    table.add_row(
        "labels bought", f"{labels['bought']} ({labels['share']:.1%}), {labels['probes']} as probes"
    )
    table.add_row("routes", ", ".join(f"{n} {route}" for route, n in summary["routes"].items()))
    table.add_row("uncertainty by", summary["estimator"])
    table.add_row("training", f"{summary['steps']} GRPO steps in verl")
    for name, key in (("mean of samples at T=1", "mean"), ("greedy", "greedy")):
        gain = 100 * (after[key] - before[key])
        table.add_row(
            f"validation, {name}", f"{before[key]:.1%} -> {after[key]:.1%} ({gain:+.1f} points)"
        )
    minutes = ", ".join(f"{name} {s:.0f}" for name, s in summary["seconds"].items())
    table.add_row("seconds", f"{summary['seconds_total']:.0f} ({minutes})")
    table.add_row("peak memory", f"{summary['peak_memory_gib']} GiB")
    table.add_row("report", str(run / "report.html"))
    console.print(table)


if __name__ == "__main__":
    main()
