"""Learning curves of GRPO in verl on a CPU machine: four ways to spend labels on one pool.

    make grpo-cpu        (or: python recipes/grpo_cpu/run.py --out runs/grpo_cpu --seeds 0)

Policy, pool and scores are made once, the quickstart's policy taken where it is there. Each arm and
seed is then trained in a run directory of its own and leaves arms/ARM-SEED.json; one that is there
is not trained again, so a killed recipe goes on where it was. Ends with a table, summary.json and
curves.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from arms import ARMS, Arm, curve, finished, results
from curves_table import tables
from picture import picture
from stages import PeakMemory, Stages, annotate, labels_bought, write_json

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.files import write_bytes_atomic

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parent / "quickstart"

# fmt: off
FULL: dict[str, Any] = {
    "policy": [], "teach": [],
    # Two prompts in five are mastered: the share that the paper's pool is reported to drop.
    "pool": ["--three", 384, 160, "--two", 256, 40],
    "rollouts": 8, "probes": 64, "budget": 224,
    # The probes' choice; 0.25 is what chance alone reaches once in 20 times on 64 of them.
    "triage": ["--estimator", "auto", "--min-spearman", "0.25"],
    "steps": 24, "every": 4, "batch_size": 32, "samples": 4, "learning_rate": "1e-3",
}
# To try the recipe: everything real, nothing learnt.
SMALL: dict[str, Any] = {
    "policy": ["--small"], "teach": ["--steps", 40],
    "pool": ["--three", 58, 16, "--two", 38, 8],
    "rollouts": 4, "probes": 24, "budget": 40,
    # A model of half a minute gives no ranking worth the name.
    "triage": ["--min-spearman", "1e-6", "--alpha", "1", "--overflow", "self_train"],
    "steps": 2, "every": 1, "batch_size": 8, "samples": 1, "learning_rate": "3e-4",
}
# fmt: on
MAX_PROMPT_TOKENS, MAX_TOKENS = 64, 128


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/grpo_cpu"))
    parser.add_argument(
        "--policy", type=Path, default=Path("runs/quickstart/policy"),
        help="the quickstart's, copied if it is there and made anew if not",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--small", action="store_true", help="everything once, in small")
    args = parser.parse_args()
    try:
        make(args.out, args.policy, args.seeds, args.arms, SMALL if args.small else FULL)
    except PivotTraceError as error:
        sys.exit(f"error: {error}")


def make(
    out: Path, policy: Path, seeds: Sequence[int], arms: Sequence[str], size: dict[str, Any]
) -> None:
    """Everything, from the policy to the table."""
    console = Console(highlight=False)
    os.environ.setdefault("VERL_PLATFORM", "cpu")
    (out / "arms").mkdir(parents=True, exist_ok=True)
    memory = PeakMemory()
    memory.start()
    stage = Stages(out / "stages.json", console)
    scored = prepare(stage, out, policy, size)
    for seed in seeds:
        for name in arms:
            result = out / "arms" / f"{name}-{seed}.json"
            if finished(result, settings(size)):
                console.rule(f"[bold]{name}, seed {seed}: done earlier", align="left")
                continue
            console.rule(f"[bold]{name}, seed {seed}: {ARMS[name].title}", align="left")
            write_json(result, train_arm(console, scored, name, seed, size))
            stage.note_peak(memory)
            finish(out, size, stage.log)
    finish(out, size, stage.log)
    console.print(Markdown(tables(json.loads((out / "summary.json").read_text()))))


def prepare(stage: Stages, out: Path, policy: Path, size: dict[str, Any]) -> Path:
    """What all arms share: the policy, the pool, and a run directory with its scores."""
    python, pivottrace = sys.executable, Path(sys.executable).with_name("pivottrace")
    data, scored, base, taught = (out / name for name in ("data", "scored", "base", "policy"))
    if not base.exists() and (policy / "policy.json").exists():
        copy_folder(policy, base)
    # Leaves the copy as it is, unless it was made from other sources or settings.
    stage("policy", python, QUICKSTART / "make_policy.py", "--out", base, *size["policy"])
    stage("policy", python, HERE / "teach.py", "--policy", base, "--out", taught, *size["teach"])
    stage("pool", python, HERE / "mix_pool.py", "--out", data, *size["pool"])
    stage(
        "score", pivottrace, "init", scored, "--pool", data / "pool.jsonl", "--model", taught,
        "--val", data / "val.jsonl", "--answers", "expression",
    )  # fmt: skip
    stage(
        "score", pivottrace, "score", scored, "--rollouts", size["rollouts"],
        "--max-prompt-tokens", MAX_PROMPT_TOKENS, "--max-tokens", MAX_TOKENS,
    )  # fmt: skip
    return scored


def train_arm(
    console: Console, scored: Path, name: str, seed: int, size: dict[str, Any]
) -> dict[str, Any]:
    """One arm with one seed, from the scored pool to its learning curve."""
    arm, pivottrace = ARMS[name], Path(sys.executable).with_name("pivottrace")
    run, data = scored.with_name(f"{name}-{seed}"), scored.with_name("data")
    if not run.exists():
        # Without the traces, which only scoring and the report read.
        copy_folder(scored, run, "traces")
    # Beside what they made, so that an arm whose folder is removed begins anew.
    stage = Stages(run / "stages.json", console)
    plan(stage, arm, run, data, seed, size)
    switch = ["env", "PIVOTTRACE_DISABLE=1"] if arm.stock else []
    order = ["data.shuffle=true", f"data.seed={seed}"] if arm.stock else []
    stage(
        "train", *switch, pivottrace, "train", run, "--seed", seed,
        "--steps", size["steps"], "--batch-size", size["batch_size"],
        "--rollouts", size["rollouts"], "--learning-rate", size["learning_rate"],
        "--val-samples", size["samples"], f"trainer.test_freq={size['every']}",
        "actor_rollout_ref.actor.optim.lr_scheduler_type=cosine", *order,
    )  # fmt: skip
    labels, triage = labels_bought(run), json.loads((run / "triage.json").read_text())
    steps, every, samples = size["steps"], size["every"], size["samples"]
    metrics = run / "train" / "metrics.jsonl"
    return {
        "arm": name,
        "seed": seed,
        "settings": settings(size),
        "labels": labels,
        "routes": triage["routes"],
        "estimator": triage.get("estimator"),
        "curve": curve(metrics, steps, every, samples, size["batch_size"], labels),
        "seconds": stage.log["seconds"]["train"],
    }


def settings(size: dict[str, Any]) -> dict[str, Any]:
    """What two arms must share to be compared."""
    names = ("steps", "every", "batch_size", "rollouts", "samples", "learning_rate", "budget")
    return {name: size[name] for name in names}


def copy_folder(source: Path, target: Path, *without: str) -> None:
    """A copy that is there as a whole or not at all."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary, ignore=shutil.ignore_patterns(*without))
    temporary.rename(target)


def plan(stage: Stages, arm: Arm, run: Path, data: Path, seed: int, size: dict[str, Any]) -> None:
    """Routes and labels of one arm."""
    python, pivottrace = sys.executable, Path(sys.executable).with_name("pivottrace")
    n_pool = json.loads((run / "manifest.json").read_text())["pool"]["n_prompts"]
    labels = {"all": n_pool, "budget": size["budget"], "none": 0}[arm.labels]
    if arm.triage:
        stage("triage", pivottrace, "probe", run, "--n", size["probes"], "--seed", seed)
        annotate(stage, pivottrace, run, data, "probes")
        stage("triage", pivottrace, "triage", run, "--budget", labels, *size["triage"])
    else:
        stage(
            "triage", python, HERE / "baseline.py", run, "--labels", labels,
            "--rest", arm.rest, "--seed", seed,
        )  # fmt: skip
    if labels:
        annotate(stage, pivottrace, run, data, "queue")


def finish(out: Path, size: dict[str, Any], log: dict[str, Any]) -> None:
    """summary.json and curves.svg of the arms that are done."""
    manifest = json.loads((out / "scored" / "manifest.json").read_text())
    summary = {
        "pool": manifest["pool"]["n_prompts"],
        "validation": manifest["val"]["n_prompts"],
        "settings": settings(size),
        "arms": results(out / "arms"),
        "seconds": log["seconds"],
        "peak_memory_gib": log.get("peak_memory_gib"),
        "versions": manifest["versions"],
    }
    write_json(out / "summary.json", summary)
    write_bytes_atomic(out / "curves.svg", picture(summary))


if __name__ == "__main__":
    main()
