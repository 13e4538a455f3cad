"""From scores to files for verl by the command line: budgets, review, export, and no peeking."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pivottrace_verl.annotation.formats import table_of
from pivottrace_verl.cli import app
from pivottrace_verl.pool import RunDir
from tests.score_table import score_row

N = 60
BROKEN = (7, 30, 50)
SOURCES = ("sums", "words=hard")


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def question(i: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{i} + {i}?"}]


def truth(i: int) -> str:
    return str(2 * i)


def call(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def done(*words: str | Path) -> str:
    result = call(*words)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def make_scores(run: RunDir) -> None:
    """Prompt i is right in ever fewer of 8 rollouts, and denser; three prompts are truncated."""
    rows = []
    for i, prompt in enumerate(run.pool()):
        right = round(8 * (1 - i / N))
        answers = [(truth(i), right), ("-1", 8 - right)]
        broken = {"truncated": 8 if i in BROKEN else 0}
        rows.append(score_row(prompt.pt_id, answers, float(i), length_mean=30.0, **broken))
    run.write_score_part(0, rows)
    run.merge_scores()


def make_run(folder: Path, secret: Callable[[int], str] = truth, val: bool = True) -> Path:
    """A scored run directory; the incoming pool holds `secret` as its answers."""
    folder.mkdir()
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "w.safetensors").write_bytes(b"w" * 100)
    rows = [
        {
            "prompt": question(i),
            "data_source": SOURCES[i % 2],
            "reward_model": {"style": "rule", "ground_truth": secret(i)},
            "extra_info": {"answer": secret(i)},
        }
        for i in range(N)
    ]
    words = ["init", folder / "run", "--pool", jsonl(folder / "pool.jsonl", rows)]
    if val:
        tests = [{"prompt": question(i), "label": truth(i)} for i in range(N, N + 5)]
        words += ["--val", jsonl(folder / "val.jsonl", tests)]
    done(*words, "--model", model, "--answers", "exact")
    make_scores(RunDir.open(folder / "run"))
    return folder / "run"


def label(run: Path, what: str, secret: Callable[[int], str] = truth) -> None:
    answers = run.parent / "answers.jsonl"
    pool = RunDir.open(run).pool()
    jsonl(answers, [{"pt_id": p.pt_id, "label": secret(i)} for i, p in enumerate(pool)])
    queue, filled = run.parent / f"{what}.csv", run.parent / f"{what}-filled.csv"
    done("annotate", "export", run, queue, "--what", what)
    done("annotate", "fill", queue, filled, "--answers", answers)
    done("annotate", "import", run, filled)


@pytest.fixture
def probed(tmp_path: Path) -> Path:
    run = make_run(tmp_path / "world")
    done("probe", run, "--n", "24")
    label(run, "probes")
    return run


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


# Triage


def test_probes_are_not_drawn_among_broken_prompts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "world")
    assert "3 prompts whose rollouts are broken" in done("probe", run, "--n", str(N - len(BROKEN)))
    broken = {RunDir.open(run).pool()[i].pt_id for i in BROKEN}
    assert not broken & set(RunDir.open(run).probes()["pt_ids"])
    refused = call("probe", run, "--n", str(N))
    assert refused.exit_code == 2 and f"leaves {N - len(BROKEN)} to choose from" in refused.stderr


def test_the_summary_says_thresholds_with_intervals_costs_and_how_to_list_the_broken(
    probed: Path,
) -> None:
    text = done("triage", probed, "--budget", "30", "--floor", "words=hard=10")
    info = RunDir.open(probed).triage()
    low, high = info["curve"]["u_high_interval"]
    assert f"u_high {info['curve']['u_high']:.2f} [{low:.2f}, {high:.2f}]" in text
    assert "24 labels bought, 6 to buy, " in text
    assert f"{len(BROKEN)} prompts are set apart for review" in text
    assert "--route review" in text
    assert "--max-truncated 1" in text
    assert info["sources"][0]["source"] == "words=hard"


def test_costs_and_their_fingerprint_are_kept_with_the_plan(probed: Path) -> None:
    pool = RunDir.open(probed).pool()
    costs = jsonl(probed.parent / "costs.jsonl", [{"pt_id": pool[-1].pt_id, "cost": 2.5}])
    text = done("triage", probed, "--costs", costs, "--budget-cost", "27", "--json")
    info = json.loads(text)
    assert info["costs"]["file"] == "costs.jsonl" and len(info["costs"]["fingerprint"]) == 16
    assert info["labels"]["spent"] == 24.0
    assert info["labels"]["cost_to_buy"] <= 3.0
    assert RunDir.open(probed).plan()["cost"].to_pylist()[-1] == 2.5


@pytest.mark.parametrize(
    "words",
    [
        ("--budget", "-1"),
        ("--budget-cost", "nan"),
        ("--budget-cost", "-1"),
        ("--budget", "3", "--budget-cost", "3"),
        ("--quota", "sums"),
        ("--quota", "sums=-1"),
        ("--quota", "sums=1.5"),
        ("--quota", "sums=1", "--quota", "sums=2"),
        ("--floor", "nobody=1"),
        ("--floor", "sums=9", "--budget", "5"),
        ("--floor", "sums=30", "--budget", "30"),
        ("--priority", "loudest"),
        ("--max-truncated", "2"),
        ("--costs", "absent.csv"),
        ("--costs", "absent.parquet"),
        ("--seed", "-1"),
    ],
)
def test_a_triage_that_cannot_be_meant_is_one_sentence_and_writes_nothing(
    probed: Path, words: tuple[str, ...]
) -> None:
    before = files(probed)
    result = call("triage", probed, *words)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert files(probed) == before


def test_a_dry_run_shows_what_would_be_and_writes_nothing(probed: Path) -> None:
    before = files(probed)
    shown = done("triage", probed, "--budget", "30", "--dry-run")
    assert "nothing was written" in shown
    assert files(probed) == before
    plainly = shown.replace("; nothing was written (--dry-run)", "")
    written = done("triage", probed, "--budget", "30")
    assert written == f"{plainly}next: pivottrace annotate export {probed} FILE\n"


# Export


def test_an_export_holds_the_labelled_prompts_and_only_them(probed: Path, tmp_path: Path) -> None:
    done("triage", probed, "--budget", "30")
    label(probed, "queue")
    text = done("export", probed, tmp_path / "out")
    run = RunDir.open(probed)
    rows = pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    plan = {row["pt_id"]: row for row in run.plan().to_pylist()}
    labels = run.ledger().labels()
    expected = [p for p in run.pool() if plan[p.pt_id]["route"] == "annotate"]
    assert [row["extra_info"]["pt_id"] for row in rows] == [p.pt_id for p in expected]
    for index, (row, prompt) in enumerate(zip(rows, expected, strict=True)):
        assert row["prompt"] == prompt.messages
        assert row["data_source"] == prompt.data_source
        assert row["reward_model"] == {"style": "rule", "ground_truth": labels[prompt.pt_id]}
        assert row["extra_info"] == {
            "index": index,
            "pt_id": prompt.pt_id,
            "labeled": True,
            "route": "annotate",
            "uncertainty": plan[prompt.pt_id]["uncertainty"],
        }
    val = pq.read_table(tmp_path / "out" / "val.parquet").to_pylist()
    assert [row["reward_model"]["ground_truth"] for row in val] == [
        truth(i) for i in range(N, N + 5)
    ]
    assert "--with-self-train" in text


def test_self_train_rows_come_on_request_without_a_ground_truth_and_say_so(
    probed: Path, tmp_path: Path
) -> None:
    done("triage", probed, "--budget", "24")
    plan = RunDir.open(probed).plan().to_pylist()
    # A label that came after the plan is of no use before the next one.
    late = next(row["pt_id"] for row in plan if row["route"] == "self_train")
    who = {"annotator": "ana", "source_file": "f", "purpose": "annotate"}
    RunDir.open(probed).ledger().append([{"pt_id": late, "label": "7", **who}])
    text = done("export", probed, tmp_path / "out", "--with-self-train")
    assert "need PivotTrace's trainer" in text
    rows = pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    routes = {row["extra_info"]["route"] for row in rows}
    assert routes == {"annotate", "self_train"}
    for row in rows:
        labelled = row["extra_info"]["route"] == "annotate"
        assert row["extra_info"]["labeled"] == labelled
        assert (row["reward_model"]["ground_truth"] is not None) == labelled


def test_an_export_whose_labels_are_missing_writes_nothing(probed: Path, tmp_path: Path) -> None:
    done("triage", probed, "--budget", "30")
    result = call("export", probed, tmp_path / "out")
    assert result.exit_code == 2 and "6 prompts on route annotate have no label" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_without_validation_prompts_exports_no_val_file(tmp_path: Path) -> None:
    run = make_run(tmp_path / "world", val=False)
    done("probe", run, "--n", "24")
    label(run, "probes")
    done("triage", run, "--budget", "24")
    assert "no val.parquet" in done("export", run, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["train.parquet"]


def test_the_prompts_of_a_route_can_be_listed_with_how_their_rollouts_went(
    probed: Path, tmp_path: Path
) -> None:
    done("triage", probed)
    done("export", probed, tmp_path / "review.csv", "--route", "review")
    with open(tmp_path / "review.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == [f"{i} + {i}?" for i in sorted(BROKEN, reverse=True)]
    assert {row["truncated"] for row in rows} == {"8"}
    assert {row["reason"] for row in rows} == {"broken: too many rollouts truncated"}


@pytest.mark.parametrize("name", ["r.csv", "r.jsonl", "r.parquet"])
def test_a_list_of_a_route_is_written_in_every_table_format_and_over_an_older_list(
    probed: Path, tmp_path: Path, name: str
) -> None:
    done("triage", probed)
    for route in ("self_train", "drop", "review", "self_train"):
        done("export", probed, tmp_path / name, "--route", route)
        rows = [row for _, row in table_of(tmp_path / name).rows(tmp_path / name, ("pt_id",))]
        plan = RunDir.open(probed).plan().sort_by("rank").to_pylist()
        assert [row["pt_id"] for row in rows] == [p["pt_id"] for p in plan if p["route"] == route]
        assert {str(row["n_rollouts"]) for row in rows} == {"8"}


def test_an_export_may_be_repeated_but_takes_no_place_of_other_training_data(
    probed: Path, tmp_path: Path
) -> None:
    done("triage", probed, "--budget", "24")
    done("export", probed, tmp_path)
    done("export", probed, tmp_path, "--with-self-train")
    other = pa.table({"prompt": ["q"], "extra_info": [{"index": 0}]})
    pq.write_table(other, tmp_path / "val.parquet")
    before = [(tmp_path / name).read_bytes() for name in ("train.parquet", "val.parquet")]
    result = call("export", probed, tmp_path)
    assert result.exit_code == 2 and "val.parquet is there already" in result.stderr
    assert before == [(tmp_path / n).read_bytes() for n in ("train.parquet", "val.parquet")]


def test_the_summary_names_a_cost_only_where_it_is_not_the_number_of_labels(
    probed: Path, tmp_path: Path
) -> None:
    assert "24 labels bought, 6 to buy, " in done("triage", probed, "--budget", "30")
    dear = next(r for r in RunDir.open(probed).plan().to_pylist() if "not trusted" in r["reason"])
    jsonl(tmp_path / "costs.jsonl", [{"pt_id": dear["pt_id"], "cost": 2.5}])
    said = done("triage", probed, "--costs", tmp_path / "costs.jsonl")
    assert "24 labels bought, 19 to buy for 20.5." in said
    assert "24 labels bought, 4 to buy, " in done("triage", probed, "--budget-cost", "28")


@pytest.mark.parametrize(
    "words", [("x.csv", "--route", "nowhere"), ("x.pdf", "--route", "review"),
              ("x.csv", "--route", "review", "--with-self-train")]
)  # fmt: skip
def test_a_listing_that_cannot_be_meant_is_refused(
    probed: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    done("triage", probed)
    result = call("export", probed, tmp_path / words[0], *words[1:])
    assert result.exit_code == 2 and result.stderr.startswith("error: ")
    assert not (tmp_path / words[0]).exists()


# Label privacy


def test_labels_that_were_not_bought_change_no_byte_of_plan_and_export(tmp_path: Path) -> None:
    """Two rounds in two worlds: in the second every answer that the first did not buy is nonsense,
    in the pool and in the annotator's file."""

    def whole(folder: Path, secret: Callable[[int], str]) -> tuple[dict[str, bytes], set[str]]:
        run = make_run(folder, secret)
        done("probe", run, "--n", "24")
        label(run, "probes", secret)
        done("triage", run, "--budget", "30", "--floor", "sums=14")
        label(run, "queue", secret)
        done("triage", run, "--budget", "36", "--priority", "threshold")
        label(run, "queue", secret)
        for words in (("a",), ("b", "--with-self-train"), ("review.csv", "--route", "review")):
            done("export", run, folder / "out" / words[0], *words[1:])
        kept = ("probes.json", "scores.parquet", "triage.json", "plan.parquet")
        content = {name: (run / name).read_bytes() for name in kept}
        return content | files(folder / "out"), set(RunDir.open(run).ledger().labels())

    first, bought = whole(tmp_path / "true", truth)
    ids = [prompt.pt_id for prompt in RunDir.open(tmp_path / "true" / "run").pool()]
    assert len(bought) == 36 < N

    def poison(i: int) -> str:
        return truth(i) if ids[i] in bought else f"nonsense {i * 7919}"

    second, bought_again = whole(tmp_path / "poison", poison)
    assert bought_again == bought
    assert second == first
    assert not any(b"nonsense" in content for content in second.values())
