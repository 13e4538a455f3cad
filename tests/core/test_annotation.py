"""Queue files out, labels in, letter by letter and all or nothing."""

import csv
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pivottrace_verl.annotation import export_queue, import_labels
from pivottrace_verl.annotation.formats import table_of
from pivottrace_verl.annotation.formats.csv_file import guard, unguard
from pivottrace_verl.annotation.oracle import fill
from pivottrace_verl.errors import PivotTraceError
from tests.score_table import score_row

quick = settings(deadline=None, max_examples=150)
FORMULAS = ["=1+1", "+1", "-5", "@SUM(A1)", "\tx", "\rx", "'=1", "''", "'", "'-5", "=HYPERLINK(1)"]
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(FORMULAS)


def write_rows(path, rows, columns):
    table_of(path).write(path, rows, columns)


def read_rows(path, needed):
    return table_of(path).rows(path, needed)


def ids_of(run):
    return [prompt.pt_id for prompt in run.pool()]


def write_labels(path, pairs):
    write_rows(path, [{"pt_id": i, "label": label} for i, label in pairs], ["pt_id", "label"])
    return path


def relabel(path, labels):
    """Fill a queue file as a person would, in place."""
    rows = [row for _, row in read_rows(path, ("pt_id", "label"))]
    for row in rows:
        row["label"] = labels.get(row["pt_id"], row["label"])
    write_rows(path, rows, list(rows[0]))


@quick
@given(texts)
@example("'=x")
def test_a_guarded_cell_comes_back_and_is_no_formula(cell):
    assert unguard(guard(cell)) == cell
    assert not guard(cell).startswith(("=", "+", "-", "@", "\t", "\r"))


@quick
@given(st.text(max_size=8).filter(lambda t: not t.startswith("'")))
def test_what_a_person_types_without_a_guard_means_itself(cell):
    assert unguard(cell) == cell


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.tuples(texts.filter(bool), texts), max_size=5))
def test_rows_survive_a_queue_file_letter_by_letter(tmp_path_factory, suffix, rows):
    path = tmp_path_factory.mktemp("rows") / f"q.{suffix}"
    dicts = [{"pt_id": a, "label": b} for a, b in rows]
    write_rows(path, dicts, ["pt_id", "label"])
    assert [row for _, row in read_rows(path, ("pt_id", "label"))] == dicts


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_an_exported_queue_holds_the_prompts_in_order_with_an_empty_label(make_run, suffix):
    run = make_run(answers_kind="expression")
    ids = ids_of(run)
    run.write_score_part(0, [score_row(i, [("-5", 4)]) for i in ids])
    run.merge_scores()
    plan = [
        {"pt_id": i, "route": "annotate", "uncertainty": k / 11, "rank": 12 - k, "reason": "x"}
        for k, i in enumerate(ids)
    ]
    run.write_plan(plan, {})
    path = run.path / "queue" / f"q.{suffix}"
    assert export_queue(run, [ids[3], ids[1]], path) == 2
    rows = [row for _, row in read_rows(path, ("pt_id",))]
    assert [row["pt_id"] for row in rows] == [ids[3], ids[1]]
    assert rows[0]["prompt"] == "What is 3 + 1?"
    assert rows[0]["data_source"] == "sums"
    assert float(rows[0]["uncertainty"]) == 3 / 11
    assert rows[0]["majority"] == "-5"
    assert rows[0]["label"] == ""
    assert list(rows[0]) == [
        "pt_id",
        "prompt",
        "data_source",
        "uncertainty",
        "majority",
        "label",
    ]


def test_a_prompt_that_is_a_formula_is_harmless_in_csv(tmp_path, model):
    from pivottrace_verl.pool import RunDir

    pool = tmp_path / "p.jsonl"
    row = {"prompt": [{"role": "user", "content": '=cmd|"/C calc"!A0'}], "data_source": "@x"}
    pool.write_text(json.dumps(row) + "\n")
    run = RunDir.create(tmp_path / "run", pool, model, answers_kind="exact")
    export_queue(run, ids_of(run), tmp_path / "q.csv")
    with open(tmp_path / "q.csv", newline="") as file:
        cells = list(csv.reader(file))[1]
    assert cells[1] == '\'=cmd|"/C calc"!A0'
    assert cells[2] == "'@x"
    assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in cells)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("label", ["-5", "=1", "+3", "'-5", "@a", "1,5", '"q"', "é\u2028x"])
def test_a_label_survives_export_fill_and_import(make_run, tmp_path, suffix, label):
    run = make_run()
    path = tmp_path / f"q.{suffix}"
    export_queue(run, ids_of(run)[:2], path)
    relabel(path, {ids_of(run)[0]: label})
    result = import_labels(run, path, annotator="ana", purpose="annotate")
    assert (result.added, result.already, result.empty, result.conflicts) == (1, 0, 1, [])
    assert run.ledger().labels() == {ids_of(run)[0]: label}
    entry = run.ledger().entries()[0]
    assert (entry["annotator"], entry["purpose"], entry["cost"]) == ("ana", "annotate", 1.0)
    assert entry["source_file"] == str(path)


def test_importing_again_changes_nothing(make_run, tmp_path):
    run = make_run(answers_kind="expression")
    a, b = ids_of(run)[:2]
    import_labels(run, write_labels(tmp_path / "q.csv", [(a, "1+2"), (b, "")]), "ana", "probe")
    before = run.ledger().path.read_bytes()
    other = write_labels(tmp_path / "r.csv", [(a, "2+1"), (b, "")])
    assert import_labels(run, other, "ana", "probe").already == 1
    assert run.ledger().path.read_bytes() == before


def test_a_different_label_is_a_conflict_and_the_first_one_stands(make_run, tmp_path):
    run = make_run()
    a, b = ids_of(run)[:2]
    import_labels(run, write_labels(tmp_path / "q.csv", [(a, "yes")]), "ana", "probe")
    other = write_labels(tmp_path / "r.csv", [(a, "no"), (b, "yes")])
    result = import_labels(run, other, "bo", "probe", cost=2.0)
    assert result.conflicts == [(a, "yes", "no")]
    assert result.added == 1
    assert "1 labels differ" in result.sentence()
    assert json.loads(json.dumps(result.to_dict()))["added"] == 1
    assert run.ledger().labels() == {a: "yes", b: "yes"}
    assert run.ledger().spent() == 3.0


def test_a_purpose_is_known_from_the_probes_that_were_drawn(make_run, tmp_path):
    run = make_run()
    a, b = ids_of(run)[:2]
    run.write_score_part(0, [score_row(i) for i in ids_of(run)])
    run.merge_scores()
    run.write_probes("entropy", 0, [a])
    import_labels(run, write_labels(tmp_path / "q.csv", [(a, "1"), (b, "2")]), "ana")
    assert run.ledger().purposes() == {a: "probe", b: "annotate"}


def test_numbers_in_json_are_labels(make_run, tmp_path):
    run = make_run()
    a, b, c = ids_of(run)[:3]
    path = tmp_path / "q.jsonl"
    rows = [{"pt_id": a, "label": 42}, {"pt_id": b, "label": -0.5}, {"pt_id": c, "label": None}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert import_labels(run, path, "ana", "probe").empty == 1
    assert run.ledger().labels() == {a: "42", b: "-0.5"}


def test_a_spreadsheets_byte_order_mark_blank_lines_and_extra_columns_are_no_trouble(
    make_run, tmp_path
):
    run = make_run()
    a = ids_of(run)[0]
    path = tmp_path / "q.csv"
    path.write_bytes(f'\ufeffpt_id,label,note\r\n{a},7,"two\r\nlines"\r\n,,\r\n\r\n'.encode())
    assert import_labels(run, path, "ana", "probe").added == 1
    assert run.ledger().labels() == {a: "7"}


def test_a_prompt_longer_than_the_csv_readers_default_is_read(tmp_path):
    rows = [{"pt_id": "a", "prompt": "x" * 300_000, "label": ""}]
    write_rows(tmp_path / "q.csv", rows, ["pt_id", "prompt", "label"])
    assert read_rows(tmp_path / "q.csv", ("pt_id",))[0][1] == rows[0]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_the_oracle_fills_empty_labels_and_leaves_the_rest(make_run, tmp_path, suffix):
    run = make_run()
    ids = ids_of(run)[:3]
    queue, out = tmp_path / f"q.{suffix}", tmp_path / f"filled.{suffix}"
    export_queue(run, ids, queue)
    relabel(queue, {ids[1]: "mine"})
    answers = write_labels(tmp_path / "answers.jsonl", [(i, f"-{k}") for k, i in enumerate(ids)])
    assert fill(queue, answers, out) == 2
    import_labels(run, out, "oracle", "annotate")
    assert run.ledger().labels() == {ids[0]: "-0", ids[1]: "mine", ids[2]: "-2"}


def test_the_oracle_says_which_answers_it_lacks(make_run, tmp_path):
    run = make_run()
    export_queue(run, ids_of(run)[:2], tmp_path / "q.csv")
    answers = write_labels(tmp_path / "answers.jsonl", [(ids_of(run)[0], "1")])
    with pytest.raises(PivotTraceError, match=f"1 prompts.*{ids_of(run)[1]}"):
        fill(tmp_path / "q.csv", answers, tmp_path / "out.csv")
    assert not (tmp_path / "out.csv").exists()


def test_only_the_oracle_module_takes_an_answers_file():
    from pathlib import Path

    package = Path(__file__).parents[2] / "pivottrace_verl"
    readers = [p.name for p in package.rglob("*.py") if "answers_file" in p.read_text()]
    assert readers == ["oracle.py"]
