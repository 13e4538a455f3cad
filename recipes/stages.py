"""What the recipes' drivers share: stages run as commands, what they cost, and the oracle's round.

Contract: each stage is the command a user would type, run as a process of its own; one that is done
is not run again, so a killed recipe goes on where it was.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from pivottrace_verl.files import write_bytes_atomic
from pivottrace_verl.ledger import Ledger

EVERY_S = 4.0
"""The kernel walks a process's pages to say which it shares: not to be asked all the time."""


class PeakMemory(threading.Thread):
    """Largest resident memory of this process and all below it, sampled every `EVERY_S` seconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        me = psutil.Process()
        while True:
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    memory = process.memory_full_info()
                    # Proportional set size: pages shared by several processes count once.
                    total += getattr(memory, "pss", 0) or memory.rss
                except psutil.Error:
                    continue
            self.peak = max(self.peak, total)
            time.sleep(EVERY_S)


class Stages:
    """Runs commands one after another and remembers how long each took, over restarts too."""

    def __init__(self, file: Path, console: Console) -> None:
        self.file = file
        self.console = console
        self.log: dict[str, Any] = (
            json.loads(self.file.read_text())
            if self.file.exists()
            else {"seconds": {}, "finished": []}
        )

    def __call__(self, name: str, *command: str | Path | int) -> None:
        """Run one command, unless it finished earlier; its seconds add up under `name`."""
        words = [str(word) for word in command]
        line = shlex.join(words)
        self.console.rule(f"[bold]{name}", align="left")
        if line in self.log["finished"]:
            self.console.print("done earlier", style="dim")
            return
        self.console.print("$ " + line, style="dim", highlight=False, soft_wrap=True)
        start = time.monotonic()
        status = _run(words)
        seconds = time.monotonic() - start
        self.log["seconds"][name] = round(self.log["seconds"].get(name, 0.0) + seconds, 1)
        if status == 0:
            self.log["finished"].append(line)
        self.save()
        if status != 0:
            self.console.print(
                f"error: stage {name} ended with status {status}; the same command goes on there."
            )
            sys.exit(status if status > 0 else 128 - status)

    def note_peak(self, memory: PeakMemory) -> None:
        """Keep the largest peak of all sessions."""
        before = self.log.get("peak_memory_gib", 0.0)
        self.log["peak_memory_gib"] = round(max(memory.peak / 2**30, before), 2)
        self.save()

    def save(self) -> None:
        write_json(self.file, self.log)


def write_json(file: Path, value: Any) -> None:
    """The file whole or not at all, its keys in the order they are in."""
    write_bytes_atomic(file, json.dumps(value, indent=1).encode())


def _run(words: list[str]) -> int:
    """Exit status of a command, which ends when this process is told to: it gets SIGTERM too, and
    Ctrl-C by itself."""
    with subprocess.Popen(words) as process:
        before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)


def annotate(stage: Stages, pivottrace: Path, run: Path, data: Path, what: str) -> None:
    """Export, fill, import: the path a person takes, with the oracle as the person."""
    asked, filled = run / "queue" / f"{what}.jsonl", run / "queue" / f"{what}-filled.jsonl"
    stage("annotate", pivottrace, "annotate", "export", run, asked, "--what", what)
    stage(
        "annotate", pivottrace, "annotate", "fill", asked, filled,
        "--answers", data / "answers.jsonl",
    )  # fmt: skip
    stage("annotate", pivottrace, "annotate", "import", run, filled, "--annotator", "oracle")


def labels_bought(run: Path) -> dict[str, Any]:
    """How many labels the run's ledger holds, how many of them are probes, share of the pool."""
    n_pool = json.loads((run / "manifest.json").read_text())["pool"]["n_prompts"]
    ledger = Ledger(run / "ledger.jsonl")
    labels, probes = ledger.labels(), ledger.labels("probe")
    return {
        "bought": len(labels),
        "probes": len(probes),
        "share": round(len(labels) / n_pool, 4),
    }
