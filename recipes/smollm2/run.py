"""Scores, probes and triages a pool of three tasks with a real pretrained model, on a CPU.

    make smollm2        (or: python recipes/smollm2/run.py --run runs/smollm2)

Each stage is the command a user would type, run as a process of its own; a stage that is done is
not run again, and scoring goes on at the last finished part. Nothing is trained. Ends with the
tables of README.md and summary.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from pivottrace_verl.pool import RunDir

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from stages import PeakMemory, Stages, annotate, write_json
from summary import summarise
from table import tables

HERE = Path(__file__).resolve().parent
PROBES = 96
LABEL_SHARE = 0.5
"""Most of the pool that may be labelled, probes included."""
# fmt: off
SCORE = [
    "--rollouts", "5", "--temperature", "0.7", "--max-prompt-tokens", "256", "--max-tokens", "48",
    # Rollouts have some 25 tokens: by the default of 32 nothing would be far back.
    "--window", "8", "--part-size", "44", "--hidden-states",
]
# fmt: on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/smollm2"))
    parser.add_argument("--seed", default="0")
    args = parser.parse_args()
    console = Console(highlight=False)
    os.environ.setdefault("VERL_PLATFORM", "cpu")
    # Where `pivottrace` finds the module last_number.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    run: Path = args.run
    run.mkdir(parents=True, exist_ok=True)
    memory = PeakMemory()
    memory.start()
    python, pivottrace = sys.executable, Path(sys.executable).with_name("pivottrace")
    stage = Stages(run / "stages.json", console)

    model, data = run / "model", run / "data"
    stage("model", python, HERE / "make_model.py", "--out", model)
    stage("pool", python, HERE / "make_pool.py", "--out", data, "--seed", args.seed)
    stage(
        "init", pivottrace, "init", run, "--pool", data / "pool.jsonl", "--model", model,
        "--answers", "last_number:LastNumber",
    )  # fmt: skip
    stage("score", pivottrace, "score", run, *SCORE, "--seed", args.seed)
    stage("probe", pivottrace, "probe", run, "--n", PROBES, "--seed", args.seed)
    annotate(stage, pivottrace, run, data, "probes")
    stage("estimators", pivottrace, "estimators", run, "--picture", run / "estimators.svg")
    budget = int(LABEL_SHARE * RunDir.open(run).manifest["pool"]["n_prompts"])
    # The method's own estimator first; if the probes refuse it, the one that they name.
    stage("triage", pivottrace, "triage", run, "--budget", budget, "--fallback")
    annotate(stage, pivottrace, run, data, "queue")
    stage("export", pivottrace, "export", run, run / "verl")
    stage("report", pivottrace, "report", run)
    stage.note_peak(memory)

    judged = subprocess.check_output([pivottrace, "estimators", run, "--json"])
    summary = summarise(RunDir.open(run), json.loads(judged), stage.log)
    write_json(run / "summary.json", summary)
    # A log has no edge: the tables need not be squeezed there.
    wide = console if console.is_terminal else Console(width=160)
    wide.print(Markdown(tables(summary)))


if __name__ == "__main__":
    main()
