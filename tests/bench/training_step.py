"""What a training step costs with everything on, against stock verl.

    python -m tests.bench.training_step --out tests/bench/results/training_step.json --work DIR

Runs of verl on the CPU platform, stock and ours by turns, under `tests.reproducible`: the same
policy, seeds and prompts. Ours captures two layers, votes, follows the curriculum and re-triages.
`labelled`: every prompt has its label, so both train on the same batches, which is checked.
`mixed`: some of our prompts are voted on; stock verl has the same prompts with their labels, and
its rollouts drift apart from ours as the rewards do, so tokens are given, too. Before either, one
run of ours that is not measured writes down the prompts that the curriculum draws; stock verl
reads them in that order. The first steps of a run, in which things are compiled, are left out.
A step differs from the next by up to a half, as its rollouts do, and a run from the same run again
by several per cent: `step_s` is the mean over the steps of each one's median over the runs, `ratio`
that of ours over that of stock verl, and `each` the ratio of each pair of runs.
A piece (one run) that is in DIR is not run again, so a killed benchmark goes on where it was.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pivottrace_verl.files import write_json_atomic
from pivottrace_verl.pool import RunDir
from pivottrace_verl.training.data import training_tables, write_training_files
from tests.triaged_run import make_trainable_run
from tests.verl_jobs import (
    OURS,
    STOCK,
    labelled_rows,
    make_policy,
    make_pool,
    read_lines,
    rollouts,
    run_job,
    write_rows,
)

WANTED = 1.05
WARM = 3
"""First steps of a run that are left out."""
RE_TRIAGE_EVERY = 5
CASES = ("labelled", "mixed")


def world(work: Path, prompts: int) -> None:
    """The policy, the pool and a triaged run for each case, made once."""
    if not (work / "policy").exists():
        make_policy(work / "policy")
    if not (work / "data").exists():
        make_pool(work / "data", prompts)
    for case in CASES:
        folder = work / case
        if not (folder / "run" / "train" / "train.parquet").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            run = make_trainable_run(
                folder / "run", work / "policy", work / "data", all_labelled=case == "labelled"
            )
            write_training_files(run, *training_tables(run))


def job(work: Path, case: str, name: str, options: argparse.Namespace) -> Path:
    """The folder of a run that is done; one that was cut off is made anew."""
    folder = work / case / name
    if (folder / "done").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    size = {
        "steps": options.steps,
        "batch_size": options.batch_size,
        "rollouts": options.rollouts,
    }
    common = ("trainer.save_freq=-1",)
    if name.startswith("stock"):
        rows = work / case / "stock.parquet"
        run_job(folder, STOCK, work / "policy", rows, *common, **size)
    else:
        # A copy: re-triage leaves its requests there.
        copy = folder.with_name(f"{name}-run")
        shutil.copytree(work / case / "run", copy, dirs_exist_ok=True)
        run = RunDir.open(copy)
        run_job(
            folder, OURS, work / "policy", run.path / "train" / "train.parquet", *common,
            f"pivottrace.run={run.path}",
            f"pivottrace.detector.tau={run.manifest['detector']['tau']}",
            "pivottrace.retriage.enable=true",
            f"pivottrace.retriage.every={RE_TRIAGE_EVERY}",
            **size,
        )  # fmt: skip
    (folder / "done").touch()
    return folder


def write_sequence(work: Path, case: str, drawn: Path, group: int) -> None:
    """stock.parquet: the prompts that our run drew, in that order, each with its label."""

    def solid(text: str) -> str:
        # The decoder puts spaces between the tokens.
        return "".join(text.split())

    row_of = {solid(row["prompt"][0]["content"]): row for row in labelled_rows(work / "data")}
    steps = rollouts(drawn / "rollouts")
    drawn_rows = [row_of[solid(rows[i][0])] for rows in steps for i in range(0, len(rows), group)]
    write_rows(work / case / "stock.parquet", drawn_rows)


def summary(folder: Path) -> dict[str, Any]:
    """Of the steps that count."""
    steps = [entry["data"] for entry in read_lines(folder / "metrics.jsonl")][WARM:]
    seconds = [step["timing_s/step"] for step in steps]
    out: dict[str, Any] = {
        "steps_s": [round(s, 4) for s in seconds],
        "tokens": round(statistics.mean(step["response_length/mean"] for step in steps), 2),
    }
    for name in sorted(name for name in steps[0] if name.startswith("pivottrace/seconds/")):
        out[name] = round(statistics.median(step[name] for step in steps), 5)
    return out


def measure(work: Path, case: str, options: argparse.Namespace) -> dict[str, Any]:
    """The case's runs, by turns."""
    drawn = job(work, case, "drawn", options)
    write_sequence(work, case, drawn, options.rollouts)
    runs: dict[str, list[dict[str, Any]]] = {"stock": [], "ours": []}
    for turn in range(options.pairs):
        # Who goes first changes, so that a machine that warms up favours neither.
        for who in ("stock", "ours") if turn % 2 == 0 else ("ours", "stock"):
            folder = job(work, case, f"{who}-{turn}", options)
            same = rollouts(folder / "rollouts") == rollouts(drawn / "rollouts")
            if case == "labelled" and not same:
                sys.exit(f"error: {folder} trained on other batches than {drawn}.")
            runs[who].append(summary(folder))
            print(case, who, turn, runs[who][-1], flush=True)
    steps = {who: [run["steps_s"] for run in found] for who, found in runs.items()}
    step_s = {who: typical_step(found) for who, found in steps.items()}
    return {
        "ratio": round(step_s["ours"] / step_s["stock"], 4),
        "each": [
            round(sum(ours) / sum(stock), 4)
            for ours, stock in zip(steps["ours"], steps["stock"], strict=True)
        ],
        "step_s": {who: round(s, 4) for who, s in step_s.items()},
        "runs": runs,
    }


def typical_step(runs: list[list[float]]) -> float:
    """Mean over the steps of each one's median over the runs, in seconds."""
    return statistics.mean(map(statistics.median, zip(*runs, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where pieces are kept")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side")
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rollouts", type=int, default=8)
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    settings = {n: getattr(options, n) for n in ("steps", "prompts", "batch_size", "rollouts")}
    made = work / "settings.json"
    if made.exists() and json.loads(made.read_text()) != settings:
        sys.exit(f"error: {work} holds pieces of {made.read_text()}, not of {settings}.")
    write_json_atomic(made, settings)
    load = os.getloadavg()[0]
    world(work, options.prompts)
    result = {
        "command": "python -m tests.bench.training_step " + " ".join(sys.argv[1:]),
        "wanted": WANTED,
        **settings,
        "left_out_first_steps": WARM,
        "retriage_every": RE_TRIAGE_EVERY,
        "cases": {case: measure(work, case, options) for case in options.cases},
        "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
        "note": f"load average {load:.1f} on {os.cpu_count()} cores at the start",
        "versions": {name: version(name) for name in ("verl", "torch", "ray", "transformers")},
    }
    write_json_atomic(options.out, result)
    print(json.dumps({case: found["ratio"] for case, found in result["cases"].items()}))


if __name__ == "__main__":
    main()
