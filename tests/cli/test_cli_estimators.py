"""`pivottrace estimators` on a run directory: table, JSON, picture, bad input."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from pivottrace_verl.cli import app
from pivottrace_verl.cli_estimators import _table
from pivottrace_verl.estimators import ESTIMATORS
from pivottrace_verl.pool import RunDir
from tests.score_table import score_row

runner = CliRunner()
N = 60


def call(*words: str | Path) -> Any:
    return runner.invoke(app, [str(word) for word in words], env={"COLUMNS": "100"})


@pytest.fixture
def probed(tmp_path: Path) -> Path:
    """A run whose probes are labelled: prompt i is right in about 8 - 8i/N of 8 rollouts, entropy
    says so, `length` is unknown and everything else depends on i in no way that ranks it."""
    pool = tmp_path / "pool.jsonl"
    rows = [
        {"prompt": [{"role": "user", "content": f"{i}?"}], "data_source": "s"} for i in range(N)
    ]
    pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "model.safetensors").write_bytes(b"tiny" * 100)
    run = RunDir.create(tmp_path / "run", pool, model, answers_kind="exact")
    run.update_manifest(timings={"score": 30.0})
    scores = []
    for i, prompt in enumerate(run.pool()):
        right = round(8 * (1 - i / N))
        scores.append(
            score_row(
                prompt.pt_id,
                [("yes", right), ("no", 8 - right)],
                estimate=None,
                length_mean=30.0,
                **{f"uncertainty/{name}": float(i * 37 % N) for name in ESTIMATORS}
                | {"uncertainty/entropy": float(i), "uncertainty/length": None},
            )
        )
    run.write_score_part(0, scores)
    run.merge_scores()
    filled = tmp_path / "labels.jsonl"
    ids = [prompt.pt_id for prompt in run.pool()]
    run.write_probes("entropy", 0, ids[::2])
    filled.write_text("".join(json.dumps({"pt_id": i, "label": "yes"}) + "\n" for i in ids[::2]))
    assert call("annotate", "import", run.path, filled).exit_code == 0
    return run.path


def test_the_table_fits_100_columns_and_closes_with_sentences(probed: Path) -> None:
    result = call("estimators", probed, "--draws", "50")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    rows = [line for line in lines if line[:2] in ("+ ", "- ", "  ")]
    table = [line for line in rows if line[2:].startswith(("entropy ", "random ", "length "))]
    assert len(table) == 3 and max(len(line) for line in table) <= 100
    entropy, length = table[0], next(line for line in table if "length" in line)
    assert entropy.startswith("+ entropy") and "1.0 [1.0,1.0]" in entropy
    assert entropy.rstrip().endswith("0.5")
    assert "not scored" in length
    assert "Recommended: entropy, higher = more uncertain" in result.stdout
    assert "Triage would refuse the estimator 'pivot_density'" in result.stdout
    assert "Pivots lose to something cheaper" in result.stdout


def score_again(path: Path, change: Callable[[int], dict[str, Any]]) -> None:
    """Replace columns of prompt i; the probes stay."""
    run = RunDir.open(path)
    probes = run.probes()["pt_ids"]
    rows = run.scores().to_pylist()
    run.write_score_part(0, [{**row, **change(i)} for i, row in enumerate(rows)])
    run.merge_scores()
    run.write_probes("entropy", 0, probes)


def test_broken_probes_are_left_out_and_counted(probed: Path) -> None:
    score_again(probed, lambda i: {"truncated": 8 if i in (0, 1, 2, 4) else 0})
    told = call("estimators", probed, "--draws", "5")
    assert "Estimators on 27 probes" in told.stdout
    assert "3 labelled probes are left out: their rollouts are broken" in told.stdout
    report = json.loads(call("estimators", probed, "--draws", "5", "--json").stdout)
    assert (report["probes"], report["probes_in_review"]) == (27, 3)
    words = ("estimators", probed, "--draws", "5", "--json", "--max-truncated", "1")
    every = json.loads(call(*words).stdout)
    assert (every["probes"], every["probes_in_review"]) == (30, 0)


def test_probes_that_are_all_broken_judge_nothing(probed: Path) -> None:
    score_again(probed, lambda i: {"unparseable": 8})
    result = call("estimators", probed)
    assert result.exit_code == 2
    assert "Only 0 probes are labelled beside 30 whose rollouts are broken" in result.stderr


def test_an_estimator_that_needs_hidden_states_is_refused_where_there_are_none(
    probed: Path,
) -> None:
    score_again(probed, lambda _: dict.fromkeys(["uncertainty/coe", "uncertainty/cot_kinetics"]))
    told = call("estimators", probed, "--draws", "5").stdout
    assert told.count("not scored") == 3  # length is the third
    assert "coe, cot_kinetics would need `pivottrace score --hidden-states`" in told
    for verb in ("triage", "probe"):
        result = call(verb, probed, "--estimator", "coe")
        assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1
        assert "not scored" in result.stderr and "--hidden-states" in result.stderr
    assert not (probed / "plan.parquet").exists()
    assert RunDir.open(probed).probes()["estimator"] == "entropy"


def test_the_longest_names_and_numbers_still_fit() -> None:
    widest = {"point": -0.42, "low": -0.55, "high": -0.31}
    row = {
        "estimator": "pivot_density_distance_rise",
        "n": 9999,
        "measured": True,
        "direction": "lower",
        "auroc": {"point": 1.0, "low": 0.99, "high": 1.0},
        "auroc_within_length": {"point": 0.42, "low": 0.3, "high": 1.0},
        "spearman": widest,
        "aurc": {"point": 0.42, "low": 0.3, "high": 0.5},
        "seconds_per_prompt": 0.00123,
    }
    report = {
        "probes": 9999,
        "wrong_majorities": 1234,
        "bootstrap": {"level": 0.95},
        "estimators": [row],
    }
    console = Console(width=100)
    with console.capture() as captured:
        console.print(_table(report))
    line = next(text for text in captured.get().splitlines() if "rise" in text)
    shown = "- pivot_density_distance_rise 9999 1.0 [.99,1.0] .42 [.30,1.0] -.42 [-.55,-.31]"
    assert " ".join(line.split()) == f"{shown} .42 [.30,.50] 0.0012"


def test_json_is_one_document_and_the_picture_is_written_beside_it(
    probed: Path, tmp_path: Path
) -> None:
    before = {p: p.read_bytes() for p in probed.rglob("*") if p.is_file() and p.name != ".lock"}
    drawn = tmp_path / "estimators.svg"
    result = call("estimators", probed, "--draws", "20", "--json", "--picture", drawn)
    report = json.loads(result.stdout)
    assert report["recommended"]["estimator"] == "entropy" and report["probes"] == 30
    assert drawn.read_bytes().startswith(b"<?xml")
    again = call("estimators", probed, "--draws", "20", "--json")
    assert json.loads(again.stdout) == report
    assert before == {
        p: p.read_bytes() for p in probed.rglob("*") if p.is_file() and p.name != ".lock"
    }


def test_a_recommended_estimator_is_the_one_auto_takes(probed: Path) -> None:
    report = json.loads(call("estimators", probed, "--draws", "5", "--json").stdout)
    plan = json.loads(call("triage", probed, "--estimator", "auto", "--dry-run", "--json").stdout)
    assert plan["estimator"] == report["recommended"]["estimator"]


def test_bad_input_is_one_sentence(probed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder.svg"
    folder.mkdir()
    for words, sentence in (
        (("estimators", probed, "--picture", tmp_path / "x.png"), "must end in .svg"),
        (("estimators", tmp_path / "nothing"), "nothing"),
        (("estimators", probed, "--picture", folder), "cannot be written"),
    ):
        result = call(*words)
        assert result.exit_code == 2 and sentence in result.stderr
        assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1
    (probed / "ledger.jsonl").unlink()
    result = call("estimators", probed)
    assert result.exit_code == 2 and "Only 0 of the 30 probes have a label" in result.stderr
