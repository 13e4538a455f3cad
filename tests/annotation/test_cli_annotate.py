"""`pivottrace annotate`: what a user types, sees and is refused."""

import json
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from pivottrace_verl.cli import app

from .conftest import ids_of


def call(*args):
    return CliRunner().invoke(app, ["annotate", *map(str, args)])


def refused(*args):
    result = call(*args)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


def test_a_queue_goes_out_in_any_format_and_comes_back_with_its_options(make_run, tmp_path):
    run = make_run(3)
    a, b, _ = ids_of(run)
    assert "3 prompts" in call("export", run.path, tmp_path / "out.dat", "--format", "csv").output
    path = tmp_path / "q.csv"
    path.write_text(
        f"pt_id,label,annotator\n{a},5,ana\n{a},4,bo\n{a},4,\n{b},1,ana\nstranger,1,bo\n"
    )
    assert "not in this pool" in refused("import", run.path, path)
    options = ("--annotator", "cy", "--cost", 2, "--conflicts", "majority", "--check", "none")
    result = call("import", run.path, path, *options, "--skip-bad", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["added"], found["cost"], found["rejected"]) == (2, 8.0, 1)
    assert Path(found["rejected_file"]).exists()
    assert run.ledger().labels() == {a: "4", b: "1"}
    status = json.loads(call("status", run.path, "--json").stdout)
    assert (status["bought"], status["cost"], status["open"]["queue"]) == (2, 8.0, 1)
    assert {row["annotator"] for row in status["annotators"]} == {"ana", "bo", "cy"}


def test_status_and_import_tell_a_person_what_is_in_conflict(make_run, tmp_path):
    run = make_run(2)
    a = ids_of(run)[0]
    path = tmp_path / "q.csv"
    path.write_text(f"pt_id,label,annotator\n{a},[bold]5,ana\n{a},4,bo\n")
    assert "1 of which stay open" in call("import", run.path, path).output
    shown = call("status", run.path).output
    assert "1 conflicts" in shown and "2 of the queue wait" in shown
    assert "[bold]5" in shown


def test_the_labelling_configuration_is_printed(tmp_path):
    result = call("config", "label-studio")
    assert ElementTree.fromstring(result.stdout).find("TextArea") is not None
    assert "none for 'argilla'" in refused("config", "argilla")


@pytest.mark.parametrize("verb", ["push", "pull"])
def test_without_token_or_sdk_the_server_verbs_say_what_is_missing(make_run, monkeypatch, verb):
    run = make_run(1)
    asked = (verb, run.path, "--url", "http://127.0.0.1:9", "--project", "x")
    monkeypatch.delenv("LABEL_STUDIO_API_KEY", raising=False)
    assert "LABEL_STUDIO_API_KEY is not set" in refused(*asked)
    if find_spec("label_studio_sdk") is None:
        monkeypatch.setenv("LABEL_STUDIO_API_KEY", "secret-token")
        said = refused(*asked)
        assert "pip install 'pivottrace-verl[label-studio]'" in said
        assert "secret-token" not in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--check", "some"), "sample:N"),
        (("--conflicts", "vote"), "majority, first, unanimous"),
        (("--format", "xml"), "not one of jsonl"),
        (("--format", "label-studio"), "not JSON"),
        (("--cost", "nan"), "finite number"),
        (("--cost", "-1"), "must not be negative"),
    ],
)
def test_a_bad_option_is_one_sentence_and_changes_nothing(make_run, tmp_path, options, said):
    run = make_run(1)
    path = tmp_path / "q.csv"
    path.write_text(f"pt_id,label\n{ids_of(run)[0]},1\n")
    before = sorted(run.path.rglob("*"))
    assert said in refused("import", run.path, path, *options)
    assert [p for p in sorted(run.path.rglob("*")) if p.name != ".lock"] == [
        p for p in before if p.name != ".lock"
    ]
