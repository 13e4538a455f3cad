"""A smaller quickstart with real verl, vLLM and Ray, and what must hold of what it leaves behind.

One run serves all tests of this file; each claim about its files is a test of its own.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
PIVOTTRACE = Path(sys.executable).with_name("pivottrace")

pytestmark = pytest.mark.e2e


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        env={**os.environ, "VERL_PLATFORM": "cpu", **env},
        capture_output=True,
        text=True,
        check=False,
    )


def quickstart(path: Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, ROOT / "recipes" / "quickstart" / "run.py", "--small", "--run", path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("quickstart")
    result = quickstart(path)
    log = path / "train" / "train.log"
    tail = log.read_text(errors="replace")[-6000:] if log.exists() else ""
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-3000:]}\n{tail}"
    yield path


@pytest.fixture(scope="module")
def steps(finished: Path) -> list[dict[str, Any]]:
    lines = (finished / "train" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def summary(finished: Path) -> dict[str, Any]:
    return dict(json.loads((finished / "summary.json").read_text()))


def test_summary_counts_the_pool_the_labels_and_the_routes(summary: dict[str, Any]) -> None:
    assert summary["pool"] == sum(summary["routes"].values())
    assert summary["labels"]["probes"] > 0
    assert summary["labels"]["bought"] <= 0.5 * summary["pool"]
    assert set(summary["validation"]) == {"before", "after"}
    assert all(seconds >= 0 for seconds in summary["seconds"].values())
    assert summary["peak_memory_gib"] > 0


def test_at_least_two_steps_train_on_each_route(steps: list[dict[str, Any]]) -> None:
    for route in ("annotate", "self_train"):
        seen = [s for s in steps if s["data"].get(f"pivottrace/{route}/rollouts", 0) > 0]
        assert len(seen) >= 2, f"only {len(seen)} steps trained on route {route}"


def test_every_rollout_of_training_was_traced(steps: list[dict[str, Any]]) -> None:
    for step in steps:
        if step["step"] > 0:
            assert step["data"]["pivottrace/capture/missed"] == 0
            assert step["data"]["pivottrace/capture/traced"] > 0


def test_validation_ran_before_and_after_training(steps: list[dict[str, Any]]) -> None:
    validated = [s["step"] for s in steps if any(k.startswith("val-core/") for k in s["data"])]
    assert validated == [0, steps[-1]["step"]]


def test_every_rollout_of_scoring_has_a_row_for_every_token(finished: Path) -> None:
    rows = pq.read_table(finished / "scores.parquet").to_pylist()
    tokens = {
        (row["pt_id"], g): rollout["n_tokens"]
        for row in rows
        for g, rollout in enumerate(row["rollouts"])
    }
    assert all(rollout["traced"] for row in rows for rollout in row["rollouts"])
    with safe_open(finished / "traces" / "part-00000.safetensors", framework="numpy") as file:
        tensors = list(file.keys())
        names = [name for name in tensors if not name.endswith("entropy")]
        assert names
        for name in names:
            pt_id, g = name.split("/")
            assert file.get_tensor(name).shape[0] == tokens[pt_id, int(g)]


def test_training_rows_hold_bought_labels_and_no_others(finished: Path) -> None:
    bought = {
        entry["pt_id"]: entry["label"]
        for entry in map(json.loads, (finished / "ledger.jsonl").read_text().splitlines())
    }
    rows = pq.read_table(finished / "train" / "train.parquet").to_pylist()
    assert {row["extra_info"]["route"] for row in rows} == {"annotate", "self_train"}
    for row in rows:
        info, label = row["extra_info"], row["reward_model"]["ground_truth"]
        assert label == (bought[info["pt_id"]] if info["labeled"] else None)
        assert info["labeled"] == (info["route"] == "annotate")


def test_unbought_labels_may_be_nonsense_without_changing_a_byte(
    finished: Path, tmp_path: Path
) -> None:
    """Everything before training, made again from poisoned answers, is the same; training reads
    nothing but train.parquet."""
    bought = {
        json.loads(line)["pt_id"] for line in (finished / "ledger.jsonl").read_text().splitlines()
    }
    answers = [
        json.loads(line) for line in (finished / "data" / "answers.jsonl").read_text().splitlines()
    ]
    poisoned = tmp_path / "answers.jsonl"
    poisoned.write_text(
        "".join(
            json.dumps(row if row["pt_id"] in bought else {**row, "label": "666 + 1"}) + "\n"
            for row in answers
        )
    )
    assert len(bought) < len(answers)
    pool = tmp_path / "pool.jsonl"
    pool.write_text(
        "".join(
            json.dumps({**json.loads(line), "reward_model": {"ground_truth": "666"}}) + "\n"
            for line in (finished / "data" / "pool.jsonl").read_text().splitlines()
        )
    )
    again = tmp_path / "again"
    swap = {
        str(finished): str(again),
        str(finished / "data" / "pool.jsonl"): str(pool),
        str(finished / "data" / "answers.jsonl"): str(poisoned),
    }
    commands = json.loads((finished / "quickstart.json").read_text())["finished"]
    for command in map(shlex.split, commands):
        verb = Path(command[0]).name == "pivottrace" and command[1]
        if verb == "probe":
            # Scores come from pool.parquet and the model alone, so they are taken over.
            assert (again / "pool.parquet").read_bytes() == (finished / "pool.parquet").read_bytes()
            shutil.copy(finished / "scores.parquet", again)
        if verb in ("init", "probe", "annotate", "triage"):
            replayed = [
                swap.get(word, word.replace(f"{finished}/queue", f"{again}/queue"))
                for word in command
            ]
            result = run(*replayed)
            assert result.returncode == 0, result.stderr
    assert (again / "plan.parquet").read_bytes() == (finished / "plan.parquet").read_bytes()
    code = (
        "import sys; from pivottrace_verl.pool import RunDir; "
        "from pivottrace_verl.training.data import training_tables, write_training_files; "
        "run = RunDir.open(sys.argv[1]); write_training_files(run, *training_tables(run))"
    )
    assert run(sys.executable, "-c", code, again).returncode == 0
    for name in ("train.parquet", "val.parquet"):
        assert (again / "train" / name).read_bytes() == (finished / "train" / name).read_bytes()


def test_checkpoint_is_a_model_that_differs_from_the_policy(finished: Path) -> None:
    done = json.loads((finished / "train" / "done.json").read_text())
    trained = finished / done["checkpoint"]
    assert (trained / "config.json").exists()
    with (
        safe_open(next(trained.glob("*.safetensors")), framework="numpy") as after,
        safe_open(next((finished / "policy").glob("*.safetensors")), framework="numpy") as before,
    ):
        tensors = list(before.keys())
        name = next(n for n in tensors if n.endswith("q_proj.weight"))
        assert (after.get_tensor(name) != before.get_tensor(name)).any()


def test_report_is_one_page_that_asks_for_nothing_else(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert "<svg" in page and "annotate" in page
    assert 'src="http' not in page and "<script" not in page


def test_second_run_repeats_nothing(finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*.parquet")}
    result = quickstart(finished)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("done earlier") >= 12
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*.parquet")} == before


def test_a_run_of_another_pool_is_refused_with_one_sentence(finished: Path, tmp_path: Path) -> None:
    pool = tmp_path / "pool.jsonl"
    lines = (finished / "data" / "pool.jsonl").read_text().splitlines(keepends=True)
    pool.write_text("".join(lines[1:]))
    before = (finished / "manifest.json").read_bytes()
    result = run(
        PIVOTTRACE, "init", finished, "--pool", pool, "--model", finished / "policy",
        "--answers", "expression",
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert (finished / "manifest.json").read_bytes() == before
