"""Prompts, answers and files that mean harm: shown, never run, never a path."""

import csv
import json
import re
import subprocess
import sys
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path

import pytest
from bad_pools import PICKLE
from bad_world import INIT, call, good, ids, jsonl, snapshot, write_scores

from pivottrace_verl.annotation import import_labels
from pivottrace_verl.annotation.formats.csv_file import guard
from pivottrace_verl.annotation.formats.csv_file import rows as rows_of
from pivottrace_verl.pool import RunDir

SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'></style></svg>"
FORMULAS = ["=1+1", "+1", "-5", "@SUM(A1)", "\t=1", "\r=1", "'=1", "''-1", "=cmd|' /C calc'!A0"]


class Tags(HTMLParser):
    """Every element and attribute of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.targets: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.targets |= {value or "" for name, value in attrs if name in ("href", "src")}


def test_html_in_prompts_sources_answers_and_labels_is_text_in_the_report(world: Path) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": f"{i} {SCRIPT}"}], "data_source": SCRIPT}
        for i in range(40)
    ]
    jsonl(world / "pool.jsonl", rows)
    (world / "run").rename(world / "old")
    good((INIT % "pool.jsonl").replace("expression", "exact"), world)
    (world / "new").rename(world / "run")
    write_scores(world)
    good("probe {w}/run --n 20", world)
    labels = [{"pt_id": pt_id, "label": f"{2 * i}"} for i, pt_id in enumerate(ids(world))]
    labels[3]["label"] = SCRIPT
    jsonl(world / "labels.jsonl", labels)
    good("annotate import {w}/run {w}/labels.jsonl --annotator '<script>'", world)
    good("triage {w}/run", world)
    good("report {w}/run", world)
    page = Tags()
    page.feed((world / "run" / "report.html").read_text())
    assert not page.names & {"script", "img", "iframe", "object", "base", "form"}
    assert all(target.startswith(("#", "data:")) for target in page.targets)
    assert not [name for name in page.attributes if name.startswith("on")]


def test_formulas_go_out_guarded_and_come_back_as_they_were(world: Path) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": text}], "data_source": text} for text in FORMULAS
    ]
    jsonl(world / "pool.jsonl", rows)
    made = RunDir.create(world / "new", world / "pool.jsonl", world / "model")
    from pivottrace_verl.annotation import export_queue

    export_queue(made, [prompt.pt_id for prompt in made.pool()], world / "q.csv")
    with open(world / "q.csv", newline="") as file:
        cells = [cell for row in list(csv.reader(file))[1:] for cell in row]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    back = [row for _, row in rows_of(world / "q.csv", ("pt_id", "label"))]
    assert [row["prompt"] for row in back] == FORMULAS
    assert [row["data_source"] for row in back] == FORMULAS


def test_a_label_that_looks_like_a_formula_is_bought_as_it_was_meant(world: Path) -> None:
    waiting = [i for i in ids(world) if i not in RunDir.open(world / "run").ledger().labels()]
    (world / "l.csv").write_text(f"pt_id,label\n{waiting[0]},{guard('-5')}\n{waiting[1]},-5\n")
    import_labels(RunDir.open(world / "run"), world / "l.csv", "ana")
    labels = RunDir.open(world / "run").ledger().labels()
    assert labels[waiting[0]] == labels[waiting[1]] == "-5"


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "..", "a/../../b", "C:\\x"])
def test_a_data_source_or_an_id_never_becomes_a_path(name: str, world: Path) -> None:
    rows = [json.loads(line) for line in (world / "pool.jsonl").read_text().splitlines()]
    jsonl(world / "pool.jsonl", [{**row, "data_source": name, "pt_id": name} for row in rows])
    (world / "run").rename(world / "old")
    good(INIT % "pool.jsonl", world)
    (world / "new").rename(world / "run")
    outside = {path for path in snapshot(world.parent) if not path.startswith("w/run")}
    write_scores(world)
    for command in ("probe {w}/run --n 20", "annotate export {w}/run {w}/run/q.csv --what probes"):
        good(command, world)
    (world / "run" / "l.csv").write_text(f"pt_id,label\n{name},1\n")
    assert call("annotate import {w}/run {w}/run/l.csv", world).status == 2
    good("report {w}/run", world)
    assert {path for path in snapshot(world.parent) if not path.startswith("w/run")} == outside
    assert not Path("/tmp/escaped").exists()
    assert all(re.fullmatch(r"[0-9a-f]{16}", pt_id) for pt_id in ids(world))


@pytest.mark.parametrize("where", ["pool", "label file", "weights", "parts", "ledger"])
def test_a_pickle_is_never_unpickled(where: str, world: Path, monkeypatch, tmp_path: Path) -> None:
    """Unpickled, it would make a folder in the working directory."""
    monkeypatch.chdir(tmp_path)
    place, command = {
        "pool": ("b.parquet", INIT % "b.parquet"),
        "label file": ("b.csv", "annotate import {w}/run {w}/b.csv"),
        "weights": ("model/pytorch_model.bin", "score {w}/run --part-size 16"),
        "parts": ("run/scores/part-00001.parquet", "score {w}/run --part-size 16"),
        "ledger": ("run/ledger.jsonl", "report {w}/run"),
    }[where]  # fmt: skip
    (world / place).write_bytes(PICKLE)
    assert call(command, world).status == 2
    assert not (tmp_path / "unpickled").exists()


def test_nothing_in_the_package_could_unpickle_or_evaluate_a_file() -> None:
    """Reading the source: no pickle, no eval, no YAML that makes objects, outside of training."""
    package = Path(sys.modules["pivottrace_verl"].__file__ or "").parent
    forbidden = re.compile(
        r"\bpickle\.|(?<!\.)\beval\(|(?<!\.)\bexec\(|yaml\.(?:unsafe_)?load\(|torch\.load\(|allow_pickle=True"
    )
    found = {
        str(path.relative_to(package)): hit
        for path in package.rglob("*.py")
        for hit in forbidden.findall(path.read_text())
    }
    assert not found


@pytest.mark.parametrize(
    "bomb",
    [
        b"[" * 5_000_000,
        b'{"a":' * 1_000_000,
        b'{"prompt": ' + b"9" * 3_000_000 + b"}",
        b'{"prompt": [{"role": "user", "content": "' + b"\\u0000" * 100_000,
        b"&a [*a,*a,*a,*a]\n" * 1000,
    ],
    ids=["lists", "objects", "digits", "escapes", "YAML aliases"],
)
def test_a_bomb_is_refused_in_little_memory(bomb: bytes, world: Path) -> None:
    (world / "bomb.jsonl").write_bytes(bomb)
    tracemalloc.start()
    try:
        assert call(INIT % "bomb.jsonl", world).status == 2
        assert call("annotate import {w}/run {w}/bomb.jsonl", world).status == 2
        assert tracemalloc.get_traced_memory()[1] < 8 * len(bomb) + 20_000_000
    finally:
        tracemalloc.stop()


def test_an_answers_kind_is_imported_only_by_the_user_who_names_it(world: Path) -> None:
    """A pool cannot name one: the kind comes from the command line alone."""
    row = {"prompt": [{"role": "user", "content": "q"}], "answers": "os:getcwd"}
    jsonl(world / "p.jsonl", [row])
    good(INIT % "p.jsonl", world)
    assert RunDir.open(world / "new").manifest["answers"] == {"kind": "expression"}


def test_the_console_script_says_it_in_a_process_of_its_own(world: Path) -> None:
    """Everything above runs `main` in this process; here is the program that users start."""
    command = [sys.executable, "-m", "pivottrace_verl.cli", "triage", str(world / "pool.jsonl")]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and ran.stdout == ""
    assert re.fullmatch(r"error: .*pool\.jsonl is not a run directory: .*\.\n", ran.stderr)
