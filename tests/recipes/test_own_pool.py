"""The commands of recipes/own_pool/README.md, run as they stand there.

All but `pivottrace score`, which needs an engine: invented scores take its place.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from recipe_scripts import RECIPES, invent_scores, load, make_model
from typer.testing import CliRunner

from pivottrace_verl.annotation.formats import table_of
from pivottrace_verl.cli import app
from pivottrace_verl.pool import RunDir

README = RECIPES / "own_pool" / "README.md"
to_pool = load("own_pool/to_pool")


def commands() -> list[str]:
    """Every line of the README's bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def known() -> dict[str, str]:
    """Question -> answer of the example."""
    file = RECIPES / "own_pool" / "answers.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {row["question"]: row["answer"] for row in rows}


def run_command(line: str, model: Path) -> None:
    words = [word.replace("$MODEL", str(model)) for word in shlex.split(line)]
    if words[:2] == ["pivottrace", "score"]:
        invent_scores(RunDir.open(words[2]), known())
    elif words[0] == "pivottrace":
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}"
    elif words[0] == "python":
        assert load(words[1].removeprefix("recipes/").removesuffix(".py")).main(words[2:]) == 0
    else:
        assert words[0] == "export", line


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which all commands of the README have been run, one after another."""
    here = tmp_path_factory.mktemp("clone")
    shutil.copytree(RECIPES / "own_pool", here / "recipes" / "own_pool")
    model = make_model(here / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        for line in commands():
            run_command(line, model)
    return here / "runs" / "own"


def test_the_commands_lead_from_own_fields_to_files_of_stock_verl(done: Path) -> None:
    train = pq.read_table(done / "verl" / "train.parquet").to_pylist()
    validation = pq.read_table(done / "verl" / "val.parquet").to_pylist()
    answers = known()
    assert train
    assert len(validation) == 4
    for row in train:
        assert row["reward_model"]["ground_truth"] == answers[row["prompt"][0]["content"]]
        assert row["data_source"] in {"arithmetic", "fractions", "percent", "geometry"}


def test_the_budget_of_the_readme_is_kept_and_both_lists_are_used(done: Path) -> None:
    ledger = [json.loads(line) for line in (done / "ledger.jsonl").read_text().splitlines()]
    purposes = [entry["purpose"] for entry in ledger]
    assert purposes.count("probe") == 12
    assert 0 < purposes.count("annotate") <= 6


def test_the_readme_names_every_file_of_the_example() -> None:
    text = README.read_text()
    for file in (RECIPES / "own_pool").iterdir():
        assert file.name in text or file.name in ("README.md", "__pycache__"), file.name


def test_only_answers_are_written_with_a_label(done: Path) -> None:
    for name, labelled in (("pool", False), ("val", True), ("answers", True)):
        rows = [json.loads(line) for line in (done / f"{name}.jsonl").read_text().splitlines()]
        assert all(("label" in row) is labelled for row in rows)


def test_answers_and_pool_agree_on_every_prompt_id(done: Path) -> None:
    ids = [prompt.pt_id for prompt in RunDir.open(done).pool()]
    found = table_of(done / "answers.jsonl").rows(done / "answers.jsonl", ("pt_id", "label"))
    assert [row["pt_id"] for _, row in found] == ids


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "Line 2 of .* is not JSON"),
        ("[1]", "Line 2 of .* has no question, topic"),
        ('{"question": "1 + 1?", "topic": null}', "Line 2 of .* has no topic"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, says: str
) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text('{"question": "1 + 2?", "topic": "sums"}\n' + line + "\n")
    assert to_pool.main([str(file), str(out), "--question", "question", "--source", "topic"]) == 2
    assert re.search(says, capsys.readouterr().err)
    assert not out.exists()


def test_an_answer_of_zero_and_line_separators_in_text_are_kept(tmp_path: Path) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text('{"q": "1\u2028- 1?", "t": "sums", "a": 0}\n')
    words = [str(file), str(out), "--question", "q", "--source", "t", "--answer", "a"]
    assert to_pool.main(words) == 0
    (row,) = [json.loads(text) for text in out.read_text().split("\n") if text]
    assert (row["prompt"][0]["content"], row["label"]) == ("1\u2028- 1?", "0")
