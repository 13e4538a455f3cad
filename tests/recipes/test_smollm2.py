"""The recipe with a real pretrained model: pool, summary, tables; no test loads the model."""

import json
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import recipe_scripts
from hypothesis import given
from hypothesis import strategies as st
from recipe_scripts import load
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from pivottrace_verl.cli import app
from pivottrace_verl.pool import RunDir
from pivottrace_verl.prompts import read_pool

ANSWERS = load("smollm2/last_number").LastNumber()
make_model = load("smollm2/make_model")
make_pool = load("smollm2/make_pool")
summary = load("smollm2/summary")
table = load("smollm2/table")
readme_table = load("readme_table")

N = 20


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data")
    make_pool.main(["--out", str(out), "--per-task", str(N)])
    return out


def test_the_pool_holds_distinct_prompts_of_three_tasks_in_equal_parts(data: Path) -> None:
    pool = read_pool(data / "pool.jsonl")
    assert pool.duplicates == 0
    sources = [prompt.data_source for prompt in pool.prompts]
    assert {source: sources.count(source) for source in sources} == dict.fromkeys(
        make_pool.TASKS, N
    )
    assert len(make_pool.TASKS) == 3
    # The detector's thresholds come from the first prompts.
    assert set(sources[:N]) == set(make_pool.TASKS)


def test_every_question_follows_its_tasks_worked_example_and_is_not_it(data: Path) -> None:
    for prompt in read_pool(data / "pool.jsonl").prompts:
        task = make_pool.TASKS[prompt.data_source]
        shown, worked, asked = (message["content"] for message in prompt.messages)
        assert (shown, worked) == (task.question, task.worked)
        assert asked != shown


def test_a_worked_example_ends_in_its_answer() -> None:
    endings = {"chain_sum": "9", "products": "12", "simple_equations": "8"}
    assert {t: ANSWERS.extract(make_pool.TASKS[t].worked) for t in make_pool.TASKS} == endings


def test_answers_lie_in_the_oracles_file_only_and_cover_the_pool(data: Path) -> None:
    assert all(set(row) == {"prompt", "data_source"} for row in rows(data / "pool.jsonl"))
    ids = [prompt.pt_id for prompt in read_pool(data / "pool.jsonl").prompts]
    assert [row["pt_id"] for row in rows(data / "answers.jsonl")] == ids


def test_one_answers_kind_reads_the_labels_of_all_tasks(data: Path) -> None:
    for row in rows(data / "answers.jsonl"):
        form = ANSWERS.canonical(row["label"])
        assert form is not None
        assert ANSWERS.extract(f"The answer is {row['label']}.") == form


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("58 + 26 = 74.", "74"),
        ("the sum of 58 + 26", "26"),
        ("7 - 10 is -3", "-3"),
        ("5-3", "3"),
        ("It is 1,234.50!", "1234.5"),
        ("x=-4\n", "-4"),
        ("I do not know.", None),
        ("", None),
    ],
)
def test_the_answer_is_the_last_number_of_the_text(text: str, answer: str | None) -> None:
    assert ANSWERS.extract(text) == answer


@given(st.integers() | st.decimals(-1e6, 1e6, places=3))
def test_a_number_is_read_as_itself_and_equal_to_itself_alone(number: int | Decimal) -> None:
    read = ANSWERS.extract(f"So it is {number}.")
    if read is not None:
        assert Decimal(read) == number
        assert ANSWERS.equal(read, str(number))
        assert not ANSWERS.equal(read, str(number + 1))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_prompts(
    data: Path, tmp_path: Path
) -> None:
    for name, seed in (("same", "0"), ("other", "1")):
        make_pool.main(["--out", str(tmp_path / name), "--per-task", str(N), "--seed", seed])
    for file in ("pool.jsonl", "answers.jsonl"):
        assert (tmp_path / "same" / file).read_bytes() == (data / file).read_bytes()
        assert (tmp_path / "other" / file).read_bytes() != (data / file).read_bytes()


def test_a_generator_that_repeats_itself_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_pool, "TRIES", 1)
    with pytest.raises(SystemExit, match=r"chain_sum gave .* distinct prompts, not 300"):
        make_pool.draw("chain_sum", 300, 0)


def test_the_tokenizer_splits_digits_and_ends_a_turn_where_the_model_does() -> None:
    vocabulary = {
        token: i for i, token in enumerate(["1", "2", "12", make_model.END_OF_TURN, "<|im_start|>"])
    }
    backend = Tokenizer(models.BPE(vocabulary, [("1", "2")]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_start|>")
    assert tokenizer("12").input_ids == [2]
    make_model.repair(tokenizer)
    assert tokenizer("12").input_ids == [0, 1]
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 3


def test_a_finished_model_folder_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    make_model.main(["--out", str(tmp_path / "model")])
    assert list((tmp_path / "model").iterdir()) == []


def test_a_missing_package_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_model, "PACKAGE", "no_such_package_with_weights")
    with pytest.raises(SystemExit, match=r"no_such_package_with_weights .* is not installed"):
        make_model.main(["--out", str(tmp_path / "model")])
    assert not (tmp_path / "model").exists()


@pytest.fixture(scope="module")
def found(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The summary of a run with invented scores, its probes labelled by the oracle."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(recipe_scripts.RECIPES / "smollm2"))
        yield summarised(data, tmp_path_factory.mktemp("run"))


def summarised(data: Path, here: Path) -> dict[str, Any]:
    run, model = here / "run", recipe_scripts.make_model(here / "model")

    def done(*words: str | Path) -> str:
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        return str(result.stdout)

    kind = "last_number:LastNumber"
    done("init", run, "--pool", data / "pool.jsonl", "--model", model, "--answers", kind)
    opened = RunDir.open(run)
    labels = {row["pt_id"]: row["label"] for row in rows(data / "answers.jsonl")}
    truth = {prompt.messages[-1]["content"]: labels[prompt.pt_id] for prompt in opened.pool()}
    recipe_scripts.invent_scores(opened, truth)
    opened.update_manifest(
        settings={"score": {"score": {"rollouts": 8, "temperature": 1.0, "max_tokens": 32}}}
    )
    done("probe", run, "--n", "30")
    asked, filled = here / "probes.jsonl", here / "filled.jsonl"
    done("annotate", "export", run, asked, "--what", "probes")
    done("annotate", "fill", asked, filled, "--answers", data / "answers.jsonl")
    done("annotate", "import", run, filled)
    done("triage", run, "--budget", "40")
    judged = json.loads(done("estimators", run, "--draws", "20", "--json"))
    log = {"seconds": {"score": 60.0, "triage": 3.0}, "peak_memory_gib": 1.5}
    made = summary.summarise(opened, judged, log)
    return dict(json.loads(json.dumps(made)))


def test_the_summary_accounts_for_every_prompt_probe_and_route(found: dict[str, Any]) -> None:
    tasks = found["tasks"]
    assert [row["task"] for row in tasks] == sorted(make_pool.TASKS)
    assert sum(row["prompts"] for row in tasks) == found["pool"] == 3 * N
    assert sum(row["probes"] for row in tasks) == found["labels"]["probes"] == 30
    for row in tasks:
        assert row["never"] + row["sometimes"] + row["always"] == row["probes"]
        assert sum(row["routes"].values()) == row["prompts"]
    for route, n in found["routes"].items():
        assert sum(row["routes"].get(route, 0) for row in tasks) == n


def test_pass_rates_of_the_tasks_are_those_of_their_probes(found: dict[str, Any]) -> None:
    # The invented scores fall evenly from all right to all wrong, whatever the task.
    tasks = found["tasks"]
    mean = sum(row["pass_rate"] * row["probes"] for row in tasks) / 30
    assert mean == pytest.approx(0.5, abs=0.1)
    assert all(0 < row["pass_rate"] < 1 for row in tasks)


def test_the_tables_show_every_task_and_estimator_with_its_interval(found: dict[str, Any]) -> None:
    made = table.tables(found)
    for row in found["tasks"]:
        assert f"| {row['task']} | {N} | {row['probes']} |" in made
    for row in found["judged"]["estimators"]:
        point, low, high = (f"{row['auroc'][k]:.2f}" for k in ("point", "low", "high"))
        assert f"| `{row['estimator']}` | {row['direction']} | {point} [{low}, {high}] |" in made
    for sentence in found["judged"]["sentences"]:
        assert sentence in made


def test_every_committed_result_is_what_its_readme_shows() -> None:
    recipes = [script.parent for script in recipe_scripts.RECIPES.glob("*/table.py")]
    assert len(recipes) >= 2
    for folder in recipes:
        recipe, result = folder.name, folder / "results" / "summary.json"
        script = load(f"{recipe}/table")
        text, made = script.README.read_text(), script.tables(json.loads(result.read_text()))
        assert readme_table.filled(text, recipe, made) == text, f"{recipe}/table.py --write"


def test_a_table_replaces_what_stands_between_its_comments_and_nothing_else() -> None:
    text = "before\n<!-- x: made -->\nold\n<!-- /x -->\nafter <!-- /y -->\n"
    new = readme_table.filled(text, "x", r"a\1b")
    assert new == "before\n<!-- x: made -->\na\\1b\n<!-- /x -->\nafter <!-- /y -->\n"
    with pytest.raises(SystemExit, match="no part <!-- y"):
        readme_table.filled(text, "y", "made")
