"""What a bad-input case starts from, how it is run, and how the folder is compared.

Contract: a world is a folder with `pool.jsonl`, `val.jsonl`, `model/`, `labels.csv` (all labels),
`run/` (scored, probes labelled, triaged) and `queue.csv` (exported, not filled). Scores are
invented, so nothing here needs vLLM; every other file is written by the verb a user would run.

`.lock` is left out of a comparison: it holds the id of the process that had the directory last,
and a verb has to take the lock before it can know whether anything is wrong.
"""

import dataclasses
import io
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.cli import main
from pivottrace_verl.pivots import DetectorConfig
from pivottrace_verl.pool import RunDir
from pivottrace_verl.scoring import ScoreConfig
from tests.score_table import score_row

N = 40
CHAT = [{"role": "user", "content": "1 + 1?"}]
INIT = "init {w}/new --pool {w}/%s --model {w}/model --answers expression"


@dataclass(frozen=True)
class Case:
    """One piece of bad input."""

    name: str
    command: str
    """Words of the command line; {w} is the world's folder."""
    says: str
    """Regular expression that the sentence has to match."""
    arrange: Callable[[Path], object] = lambda w: None
    """Makes the input bad; gets the world's folder."""


@dataclass(frozen=True)
class Ran:
    """What a command left: exit status and what it said."""

    status: int
    out: str
    err: str


def words(command: str, w: Path) -> list[str]:
    return [word.replace("{w}", str(w)) for word in shlex.split(command)]


def call(command: str, w: Path) -> Ran:
    """Run the console script's own function in this process, on real text streams."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with (
        patch.object(sys, "argv", ["pivottrace", *words(command, w)]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
    return Ran(status, *(stream.buffer.getvalue().decode() for stream in (out, err)))


def snapshot(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    """name -> (mode, bytes), of every file, link and folder but the locks."""
    found: dict[str, tuple[int, bytes | None]] = {}
    for path in sorted(folder.rglob("*")):
        if path.name == ".lock":
            continue
        content = None
        if path.is_symlink():
            content = str(path.readlink()).encode()
        elif path.is_file():
            content = path.read_bytes()
        found[str(path.relative_to(folder))] = (path.lstat().st_mode, content)
    return found


def check_sentence(text: str) -> str:
    """The one sentence on stderr, checked to be one."""
    lines = text.splitlines()
    assert len(lines) == 1, text
    assert lines[0].startswith("error: "), text
    sentence = lines[0].removeprefix("error: ")
    assert sentence.endswith(".") and ". " not in sentence, text
    assert sentence.isprintable() and len(sentence) < 2000, text
    assert "Traceback" not in sentence and "<class" not in sentence
    return sentence


def jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ids(w: Path) -> list[str]:
    """The pool's prompts, in its order."""
    return [prompt.pt_id for prompt in RunDir.open(w / "run").pool()]


def make(w: Path) -> None:
    model = w / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    prompts = [{"role": "user", "content": f"{i} + {i}?"} for i in range(N)]
    jsonl(w / "pool.jsonl", [{"prompt": [p], "data_source": "sums"} for p in prompts])
    jsonl(w / "val.jsonl", [{"prompt": CHAT, "label": "2", "data_source": "val"}])
    good(f"{INIT} --val {{w}}/val.jsonl" % "pool.jsonl", w)
    (w / "new").rename(w / "run")
    write_scores(w)
    rows = "".join(f"{pt_id},{2 * i}\n" for i, pt_id in enumerate(ids(w)))
    (w / "labels.csv").write_text("pt_id,label\n" + rows)
    good("probe {w}/run --n 20", w)
    good("annotate export {w}/run {w}/probes.csv --what probes", w)
    good("annotate fill {w}/probes.csv {w}/filled.csv --answers {w}/labels.csv", w)
    good("annotate import {w}/run {w}/filled.csv --annotator ana", w)
    good("triage {w}/run --budget 30", w)
    good("annotate export {w}/run {w}/queue.csv", w)


def good(command: str, w: Path) -> Ran:
    ran = call(command, w)
    assert ran.status == 0, ran
    return ran


def write_scores(w: Path) -> None:
    """Prompt i is right in about 8 * (1 - i/N) of 8 rollouts; every estimator knows it."""
    run = RunDir.open(w / "run")
    score = dataclasses.asdict(ScoreConfig(part_size=16))
    detector = DetectorConfig(tau=0.1).to_dict()
    settings = {
        "score": score,
        "capture": CaptureConfig(window=32).to_dict(),
        "detector": {name: value for name, value in detector.items() if name != "tau"},
    }
    run.update_manifest(settings={"score": json.loads(json.dumps(settings))}, detector=detector)
    rows = [scored(prompt.pt_id, i) for i, prompt in enumerate(run.pool())]
    for part, start in enumerate(range(0, N, 16)):
        run.write_score_part(part, rows[start : start + 16])
    run.merge_scores()


def scored(pt_id: str, i: int) -> dict[str, Any]:
    right = round(8 * (1 - i / N))
    return score_row(pt_id, [(str(2 * i), right), ("-1", 8 - right)], float(i), length_mean=30.0)


def copy(made: Path, to: Path) -> Path:
    """The world elsewhere; the manifest and the ledger then name the copy's own files."""
    shutil.copytree(made, to, symlinks=True)
    for name in ("manifest.json", "ledger.jsonl"):
        file = to / "run" / name
        file.write_text(file.read_text().replace(str(made), str(to)))
    return to
