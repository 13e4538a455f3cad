"""The stages of a recipe: done once, in order, each as a process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from recipe_scripts import load
from rich.console import Console

stages = load("stages")


def made(folder: Path) -> Any:
    return stages.Stages(folder / "stages.json", Console(file=(folder / "log").open("a")))


def append(file: Path, then: str = "") -> list[str | Path]:
    """A command that leaves a mark each time it runs."""
    return [sys.executable, "-c", f"open({str(file)!r}, 'a').write('x'); {then}"]


def test_a_stage_that_is_done_is_not_run_again_after_a_restart(tmp_path: Path) -> None:
    for _ in range(2):
        made(tmp_path)("mark", *append(tmp_path / "marks"))
    assert (tmp_path / "marks").read_text() == "x"
    assert json.loads((tmp_path / "stages.json").read_text())["seconds"]["mark"] >= 0


def test_a_stage_that_failed_stops_the_recipe_and_is_run_again(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            made(tmp_path)("mark", *append(tmp_path / "marks", "exit(3)"))
        assert stop.value.code == 3
    assert (tmp_path / "marks").read_text() == "xx"


def test_a_recipe_that_is_told_to_end_ends_its_stage_too(tmp_path: Path) -> None:
    stage = tmp_path / "stage.py"
    stage.write_text(
        f"import os, pathlib, time\n"
        f"pathlib.Path({str(tmp_path / 'new')!r}).write_text(str(os.getpid()))\n"
        f"os.rename({str(tmp_path / 'new')!r}, {str(tmp_path / 'pid')!r})\n"
        f"time.sleep(600)\n"
    )
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        f"import sys, pathlib\nsys.path.insert(0, {str(Path(stages.__file__).parent)!r})\n"
        f"from rich.console import Console\nfrom stages import Stages\n"
        f"stage = Stages(pathlib.Path({str(tmp_path / 'stages.json')!r}), Console())\n"
        f"stage('sleep', sys.executable, {str(stage)!r})\n"
    )
    with subprocess.Popen([sys.executable, recipe], stdout=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "pid").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        told, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command goes on there" in " ".join(told.split())
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert json.loads((tmp_path / "stages.json").read_text())["finished"] == []


def test_seconds_add_up_by_name_and_the_largest_peak_is_kept(tmp_path: Path) -> None:
    stage = made(tmp_path)
    stage("mark", *append(tmp_path / "a"))
    first = stage.log["seconds"]["mark"]
    stage("mark", *append(tmp_path / "b", "import time; time.sleep(0.3)"))
    assert stage.log["seconds"]["mark"] >= first + 0.3
    memory = stages.PeakMemory()
    for peak in (2, 1):
        memory.peak = peak * 2**30
        stage.note_peak(memory)
    assert json.loads((tmp_path / "stages.json").read_text())["peak_memory_gib"] == 2


def test_labels_are_counted_once_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"pool": {"n_prompts": 8}}')
    entries = [("a", "probe"), ("b", "annotate"), ("b", "annotate")]
    rest = {"label": "7", "annotator": "ana", "source_file": "f", "time": "now", "cost": 1}
    lines = [json.dumps({"pt_id": i, "purpose": purpose, **rest}) for i, purpose in entries]
    (tmp_path / "ledger.jsonl").write_text("\n".join(lines) + "\n")
    assert stages.labels_bought(tmp_path) == {"bought": 2, "probes": 1, "share": 0.25}
