"""The command line: bad input is one sentence, exit status 2, and leaves every file as it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pivottrace_verl.cli import app
from pivottrace_verl.estimators import NEED_TRACES
from pivottrace_verl.pool import RunDir
from tests.score_table import score_row

runner = CliRunner()
N = 40


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def make_model(path: Path, name: str = "tiny") -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "name": name}))
    (path / "model.safetensors").write_bytes(name.encode() * 100)
    return path


def make_pool(path: Path) -> Path:
    return jsonl(path, [{"prompt": chat(f"{i} + {i}?"), "data_source": "sums"} for i in range(N)])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory, initialised."""
    made = tmp_path / "run"
    RunDir.create(made, make_pool(tmp_path / "pool.jsonl"), make_model(tmp_path / "model"),
                  answers_kind="exact")  # fmt: skip
    return made


@pytest.fixture
def scored(run: Path) -> Path:
    """The same with scores: prompt i is right in i of N rollouts' worth of 8, denser the harder."""
    made = RunDir.open(run)
    rows = []
    for i, prompt in enumerate(made.pool()):
        right = round(8 * (1 - i / N))
        answers = [(str(2 * i), right), ("-1", 8 - right)]
        rows.append(score_row(prompt.pt_id, answers, float(i), length_mean=30.0))
    made.write_score_part(0, rows)
    made.merge_scores()
    return run


def answers_of(run: Path, path: Path) -> Path:
    rows = [
        {"pt_id": prompt.pt_id, "label": str(2 * i)}
        for i, prompt in enumerate(RunDir.open(run).pool())
    ]
    return jsonl(path, rows)


def call(*words: str | Path) -> Any:
    return runner.invoke(app, [str(word) for word in words])


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


def bad_label(run: Path, tmp: Path, pt_id: str | None, label: str) -> Path:
    first = RunDir.open(run).pool()[0].pt_id
    return jsonl(tmp / "labels.jsonl", [{"pt_id": pt_id or first, "label": label}])


CASES: dict[str, Callable[[Path, Path], tuple[str | Path, ...]]] = {
    "no run directory": lambda run, tmp: ("score", tmp / "nothing"),
    "pool without prompts": lambda run, tmp: (
        "init", tmp / "r", "--pool", jsonl(tmp / "p.jsonl", []), "--model", tmp / "model"),
    "pool that is not chat": lambda run, tmp: (
        "init", tmp / "r", "--pool", jsonl(tmp / "p.jsonl", [{"prompt": "1 + 1?"}]),
        "--model", tmp / "model"),
    "unreadable pool": lambda run, tmp: (
        "init", tmp / "r", "--pool", tmp / "absent.parquet", "--model", tmp / "model"),
    "another pool": lambda run, tmp: (
        "init", run, "--pool", jsonl(tmp / "p.jsonl", [{"prompt": chat("hm?")}]),
        "--model", tmp / "model", "--answers", "exact"),
    "another model": lambda run, tmp: (
        "init", run, "--pool", tmp / "pool.jsonl", "--model", make_model(tmp / "m2", "other"),
        "--answers", "exact"),
    "unknown answers kind": lambda run, tmp: (
        "init", tmp / "r", "--pool", tmp / "pool.jsonl", "--model", tmp / "model",
        "--answers", "guesswork"),
    "probe before score": lambda run, tmp: ("probe", run),
    "triage before score": lambda run, tmp: ("triage", run),
    "unknown id in labels": lambda run, tmp: (
        "annotate", "import", run, bad_label(run, tmp, "0" * 16, "7")),
    "unparseable label": lambda run, tmp: (
        "annotate", "import", run, jsonl(
            tmp / "labels.jsonl",
            [{"pt_id": RunDir.open(run).pool()[0].pt_id, "label": {"odd": 1}}])),
    "negative cost": lambda run, tmp: (
        "annotate", "import", run, bad_label(run, tmp, None, "7"), "--cost", "-1"),
    "queue of an unknown sort": lambda run, tmp: (
        "annotate", "export", run, tmp / "q.jsonl", "--what", "everything"),
    "queue of an unknown format": lambda run, tmp: ("annotate", "export", run, tmp / "q.docx"),
    "capture of an unknown sort": lambda run, tmp: ("score", run, "--capture", "sometimes"),
    "layers that are no numbers": lambda run, tmp: ("score", run, "--layers", "two"),
    "evaluation without validation prompts": lambda run, tmp: ("evaluate", run, "before"),
    "training before triage": lambda run, tmp: ("train", run),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_sentence_and_changes_nothing(
    case: str, run: Path, tmp_path: Path
) -> None:
    command = CASES[case](run, tmp_path)
    before = snapshot(tmp_path)
    result = call(*command)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert snapshot(tmp_path) == before


def bought_probes(run: Path, tmp: Path) -> None:
    answers = answers_of(run, tmp / "answers.jsonl")
    for command in (
        ("probe", run, "--n", "20"),
        ("annotate", "export", run, tmp / "q.csv", "--what", "probes"),
        ("annotate", "fill", tmp / "q.csv", tmp / "qf.csv", "--answers", answers),
        ("annotate", "import", run, tmp / "qf.csv"),
    ):
        result = call(*command)
        assert result.exit_code == 0, result.output


def test_labels_travel_by_file_and_the_plan_follows_the_probes(
    scored: Path, tmp_path: Path
) -> None:
    bought_probes(scored, tmp_path)
    result = call("triage", scored, "--budget", "30")
    assert result.exit_code == 0, result.output
    run = RunDir.open(scored)
    routes = {row["pt_id"]: row["route"] for row in run.plan().to_pylist()}
    order = [routes[prompt.pt_id] for prompt in run.pool()]
    assert order[0] == "drop" and "self_train" in order
    assert len(run.ledger().labels()) == 20
    assert sum(entry["purpose"] == "probe" for entry in run.ledger().entries()) == 20


def test_triage_refuses_while_probes_wait_for_labels(scored: Path) -> None:
    assert call("probe", scored, "--n", "20").exit_code == 0
    result = call("triage", scored)
    assert result.exit_code == 2 and "20 of 20 probes have no label" in result.stderr


def test_importing_the_same_file_again_buys_nothing(scored: Path, tmp_path: Path) -> None:
    bought_probes(scored, tmp_path)
    ledger = (scored / "ledger.jsonl").read_bytes()
    result = call("annotate", "import", scored, tmp_path / "qf.csv", "--json")
    assert json.loads(result.stdout)["added"] == 0
    assert (scored / "ledger.jsonl").read_bytes() == ledger


def test_dry_run_writes_no_plan(scored: Path, tmp_path: Path) -> None:
    bought_probes(scored, tmp_path)
    before = snapshot(scored)
    result = call("triage", scored, "--dry-run", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["routes"]
    assert snapshot(scored) == before


def test_a_second_process_on_the_run_directory_is_refused(scored: Path) -> None:
    with RunDir.open(scored).lock():
        result = call("probe", scored)
    assert result.exit_code == 2 and "Another process" in result.stderr


def test_scoring_under_the_kill_switch_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIVOTTRACE_DISABLE", "1")
    result = call("score", run)
    assert result.exit_code == 2 and "PIVOTTRACE_DISABLE=1" in result.stderr
    assert "--capture replay" in result.stderr


def test_an_estimator_that_needs_traces_says_so_where_there_are_none(run: Path) -> None:
    made = RunDir.open(run)
    unknown = {f"uncertainty/{name}": float("nan") for name in NEED_TRACES}
    rows = [score_row(prompt.pt_id, estimate=i / N, **unknown)
            for i, prompt in enumerate(made.pool())]  # fmt: skip
    made.write_score_part(0, rows)
    made.merge_scores()
    for name in NEED_TRACES:
        result = call("probe", run, "--estimator", name)
        assert result.exit_code == 2 and "--capture replay" in result.stderr
    assert call("probe", run, "--estimator", "consistency").exit_code == 0
    result = call("report", run)
    assert result.exit_code == 0, result.stderr
    assert "without traces, so there are no pivots" in (run / "report.html").read_text()


def test_traces_that_were_lost_are_told_by_what_became_of_them(
    scored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score_pool(run: RunDir, *_: object) -> None:
        part = run.scores().to_pylist()
        part[0]["rollouts"] = [dict.fromkeys(("seed", "n_tokens", "pivots"), 1) | {"traced": False}]
        run.write_score_part(0, part)
        run.merge_scores()
        run.update_manifest(detector={"tau": 0.5}, traces={"received": 9, "lost": 2, "late": 0})

    monkeypatch.setattr("pivottrace_verl.scoring.score", score_pool)
    result = call("score", scored)
    assert result.exit_code == 0
    assert "warning: 1 rollouts have no attention trace" in result.stderr
    assert "2 were lost, 9 were received." in result.stderr
    assert "warning" not in call("score", scored, "--capture", "off").stderr


def test_a_full_disk_is_one_sentence(scored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = snapshot(scored)
    monkeypatch.setattr(os, "fsync", full)
    result = call("probe", scored)
    assert result.exit_code == 2 and "no space" in result.stderr
    assert snapshot(scored) == before
