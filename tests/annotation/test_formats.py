"""Every format carries the queue out and what annotators said back, whatever prompts hold."""

import json
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pivottrace_verl.annotation import export_queue, import_labels
from pivottrace_verl.annotation.formats import (
    format_of,
    label_studio,
    read_annotations,
    table_of,
    write_queue,
)
from pivottrace_verl.annotation.formats.rows import Fault
from pivottrace_verl.errors import PivotTraceError

from .conftest import ids_of

FILES = ["q.jsonl", "q.csv", "q.parquet", "q.json", "q.argilla.json"]
NASTY = ["<script>alert(1)</script>", '=cmd|"/C calc"!A0', "{{7*7}} $prompt é\u2028"]
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


def fill(path, labels):
    """Label a file as the tool it is for would, in place."""
    name = format_of(path)
    if name == "label-studio":
        tasks = json.loads(path.read_text())
        for task in tasks:
            task["annotations"] = [
                ls_annotation(label, completed_by=7)
                for label in labels.get(task["data"]["pt_id"], [])
            ]
        path.write_text(json.dumps(tasks))
    elif name == "argilla":
        records = json.loads(path.read_text())
        for record in records:
            given = labels.get(record["id"], [])
            responses = [{"value": label, "user_id": "u"} for label in given]
            record["responses"] = {"label": responses} if responses else {}
            record["status"] = "completed" if responses else "pending"
        path.write_text(json.dumps(records))
    else:
        rows = [row for _, row in table_of(path).rows(path, ("pt_id", "label"))]
        for row in rows:
            row["label"] = "".join(labels.get(row["pt_id"], []))
        table_of(path).write(path, rows, list(rows[0]))


def ls_annotation(label, **more):
    region = {"from_name": "label", "to_name": "prompt", "type": "textarea"}
    result = [] if label is None else [{**region, "value": {"text": [label]}}]
    return {"result": result, "was_cancelled": False, **more}


def write_json(path, content):
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("name", FILES)
def test_labels_go_out_and_come_back_in_every_format(make_run, tmp_path, name):
    run = make_run(NASTY)
    ids = ids_of(run)
    path = tmp_path / name
    assert export_queue(run, ids, path) == 3
    assert [found.label for found in read_annotations(path, format_of(path))] == ["", "", ""]
    fill(path, {ids[0]: ["-5"], ids[2]: ["=1+1"]})
    result = import_labels(run, path, annotator="ana")
    assert (result.added, result.empty) == (2, 1)
    assert run.ledger().labels() == {ids[0]: "-5", ids[2]: "=1+1"}
    before = run.ledger().path.read_bytes()
    assert import_labels(run, path, annotator="ana").already == 2
    assert run.ledger().path.read_bytes() == before


@pytest.mark.parametrize("name", FILES)
def test_no_format_overwrites_labels_that_were_not_imported(make_run, tmp_path, name):
    run = make_run(2)
    a, b = ids_of(run)
    path = tmp_path / name
    export_queue(run, [a, b], path)
    fill(path, {a: ["work"]})
    before = path.read_bytes()
    with pytest.raises(PivotTraceError, match="1 labels that are not imported"):
        export_queue(run, [b], path)
    assert path.read_bytes() == before
    import_labels(run, path, "ana")
    assert export_queue(run, [b], path) == 1


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@settings(deadline=None, max_examples=40)
@given(rows=st.lists(st.tuples(texts.filter(bool), texts), max_size=5))
def test_tables_keep_every_letter(tmp_path_factory, suffix, rows):
    path = tmp_path_factory.mktemp("rows") / f"q.{suffix}"
    dicts = [{"pt_id": a, "label": b} for a, b in rows]
    table_of(path).write(path, dicts, ["pt_id", "label"])
    assert [row for _, row in table_of(path).rows(path, ("pt_id", "label"))] == dicts


@pytest.mark.parametrize("name", ["label-studio", "argilla"])
@settings(deadline=None, max_examples=40)
@given(prompt=texts, majority=st.none() | texts.filter(bool))
def test_tool_files_keep_every_letter_as_data(tmp_path_factory, name, prompt, majority):
    path = tmp_path_factory.mktemp("tool") / "q.json"
    row = {"pt_id": "a", "prompt": prompt, "majority": majority, "uncertainty": 0.5, "label": ""}
    write_queue(path, [row], list(row), name)
    (item,) = json.loads(path.read_text())
    if name == "label-studio":
        assert item["data"] == {k: v for k, v in row.items() if k != "label"}
        (prediction,) = item["predictions"]
        assert prediction["score"] == 0.5
        assert [r["value"]["text"] for r in prediction["result"]] == (
            [[majority]] if majority is not None else []
        )
    else:
        assert (item["id"], item["fields"]) == ("a", {"prompt": prompt})
        assert item["metadata"]["uncertainty"] == 0.5
        assert item["suggestions"].get("label", {}).get("value") == majority


def test_a_format_is_known_by_suffix_or_by_name(make_run, tmp_path):
    run = make_run(1)
    export_queue(run, ids_of(run), tmp_path / "q.txt", "jsonl")
    assert json.loads((tmp_path / "q.txt").read_text())["pt_id"] == ids_of(run)[0]
    for path, name, said in (("q.txt", None, "neither"), ("q.csv", "docx", "not one of jsonl")):
        with pytest.raises(PivotTraceError, match=said):
            export_queue(run, ids_of(run), tmp_path / path, name)


def test_costs_travel_with_the_rows_only_where_a_plan_names_them(make_run, tmp_path, monkeypatch):
    run = make_run(2)
    a, b = ids_of(run)
    export_queue(run, [a, b], tmp_path / "plain.csv")
    assert "cost" not in (tmp_path / "plain.csv").read_text().splitlines()[0]
    plan = run.plan()
    if "cost" in plan.column_names:
        plan = plan.drop_columns("cost")
    priced = plan.append_column("cost", pa.array([2.5, 1.0]))
    monkeypatch.setattr(run, "plan", lambda: priced)
    for name in FILES:
        path = tmp_path / f"priced.{name}"
        export_queue(run, [a, b], path)
        assert [found.cost for found in read_annotations(path, format_of(path))] == [2.5, 1.0]


# Label Studio


def test_the_shipped_configuration_shows_prompts_as_text_and_is_never_replaced(make_run, tmp_path):
    run = make_run(1)
    export_queue(run, ids_of(run), tmp_path / "q.json")
    tags = {tag.tag: tag for tag in ElementTree.fromstring((tmp_path / "q.xml").read_text()).iter()}
    assert tags["Text"].get("value") == "$prompt" and tags["Text"].get("valueType") == "text"
    assert not set(tags) & {"HyperText", "Markdown", "Style"}
    assert tags["TextArea"].get("toName") == tags["Text"].get("name") == label_studio.PROMPT
    (tmp_path / "q.xml").write_text("mine")
    export_queue(run, ids_of(run), tmp_path / "q.json")
    assert (tmp_path / "q.xml").read_text() == "mine"


def test_several_annotations_of_a_task_are_several_annotators(tmp_path):
    annotations = [
        ls_annotation("4", completed_by=7),
        ls_annotation("5", completed_by={"id": 8, "email": "bo@example.com"}),
        ls_annotation("6", completed_by={"id": 9}),
    ]
    task = {"id": 17, "data": {"pt_id": "a", "cost": "2"}, "annotations": annotations}
    found = label_studio.read(write_json(tmp_path / "e.json", [task]))
    assert [(f.annotator, f.label, f.cost) for f in found] == [
        ("user-7", "4", 2.0),
        ("bo@example.com", "5", 2.0),
        ("user-9", "6", 2.0),
    ]
    assert found[1].where == "task 17, annotation 2"


def test_cancelled_unsure_empty_and_unfinished_annotations_are_no_labels(tmp_path):
    unsure = {"from_name": "unsure", "type": "choices", "value": {"choices": ["unsure"]}}
    marked = ls_annotation("4")
    marked["result"].append(unsure)
    tasks = [
        {"data": {"pt_id": "cancelled"}, "annotations": [ls_annotation("4", was_cancelled=True)]},
        {"data": {"pt_id": "marked"}, "annotations": [marked]},
        {"data": {"pt_id": "empty"}, "annotations": [ls_annotation(None)]},
        {"data": {"pt_id": "open"}, "is_labeled": False, "annotations": [ls_annotation("4")]},
        {"data": {"pt_id": "none"}, "annotations": []},
    ]
    found = label_studio.read(write_json(tmp_path / "e.json", tasks))
    assert {f.pt_id: f.skipped for f in found} == {
        "cancelled": True,
        "marked": True,
        "empty": False,
        "open": False,
        "none": False,
    }
    assert {f.label for f in found} == {""}


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"pt_id": "a", "label": "4"}, "no data.pt_id"),
        ([], "no data.pt_id"),
        ({"data": {"pt_id": 3}}, "no data.pt_id"),
        ({"data": {"pt_id": "a"}, "annotations": ["x"]}, "annotations that are no objects"),
        ({"data": {"pt_id": "a"}, "annotations": {"x": 1}}, "annotations that are no objects"),
        ({"data": {"pt_id": "a", "cost": -1}, "annotations": []}, "the cost -1"),
        ({"data": {"pt_id": "a", "cost": 10**400}, "annotations": []}, "the cost 1000"),
        ({"data": {"pt_id": "a"}, "annotations": [{"result": "x"}]}, "no list of regions"),
        (
            {"data": {"pt_id": "a"}, "annotations": [{"result": [{"from_name": [], "value": {}}]}]},
            "no list of regions",
        ),
        ({"data": {"pt_id": "a"}, "annotations": [{"result": [{"value": 3}]}]}, "no list of reg"),
        (
            {
                "data": {"pt_id": "a"},
                "annotations": [{"result": [{"from_name": "x", "value": {}}]}],
            },
            "another labelling configuration",
        ),
        (
            {
                "data": {"pt_id": "a"},
                "annotations": [
                    {"result": [{"from_name": "label", "value": {"text": ["1", "2"]}}]},
                ],
            },
            "2 answers",
        ),
    ],
)
def test_a_task_that_is_not_ours_is_a_fault_and_the_others_are_read(tmp_path, task, said):
    good = {"data": {"pt_id": "b"}, "annotations": [ls_annotation("1")]}
    path = write_json(tmp_path / "e.json", [task, good])
    with pytest.raises(PivotTraceError, match=said):
        label_studio.read(path)
    faults: list[Fault] = []
    assert [f.pt_id for f in label_studio.read(path, faults)] == ["b"]
    assert len(faults) == 1 and faults[0].where.startswith("task 1")


@pytest.mark.parametrize("name", ["q.json", "q.argilla.json"])
@pytest.mark.parametrize("content", ["{}", "3", "[", "null", "[" * 100_000, "\xff"])
def test_a_file_that_is_no_list_is_one_sentence(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(PivotTraceError, match=r"a list|not JSON|not UTF-8"):
        read_annotations(tmp_path / name, format_of(tmp_path / name))


# Argilla


def test_argilla_responses_are_read_where_the_record_is_completed(tmp_path):
    given = [{"value": "4", "user_id": "u1"}, {"value": "5", "user_id": "u2"}]
    records = [
        {"id": "a", "responses": {"label": given}, "status": "completed"},
        {"id": "b", "responses": {"label": given}, "status": "pending"},
        {"id": "c", "responses": {}, "status": "pending"},
    ]
    path = write_json(tmp_path / "q.argilla.json", records)
    found = read_annotations(path, "argilla")
    assert [(f.pt_id, f.annotator, f.label) for f in found] == [
        ("a", "u1", "4"),
        ("a", "u2", "5"),
        ("b", None, ""),
        ("c", None, ""),
    ]


@pytest.mark.parametrize(
    "record", [{"id": 3, "responses": {}}, {"id": "a"}, {"id": "a", "responses": {"label": [3]}}, 7]
)
def test_an_argilla_record_that_is_not_ours_is_a_fault(tmp_path, record):
    path = write_json(tmp_path / "q.argilla.json", [record])
    with pytest.raises(PivotTraceError, match="Record 1"):
        read_annotations(path, "argilla")


def test_argilla_itself_reads_what_we_write_and_writes_what_we_read(make_run, tmp_path):
    rg = pytest.importorskip("argilla", reason="the extra `argilla` is not installed")
    from argilla.records._io import JsonIO

    run = make_run(NASTY)
    ids = ids_of(run)
    export_queue(run, ids, tmp_path / "out.argilla.json")
    records = JsonIO._records_from_json(tmp_path / "out.argilla.json")
    assert [record.id for record in records] == ids
    assert records[0].fields["prompt"] == NASTY[0]
    assert next(iter(records[1].suggestions)).value == "1"
    records[0].responses.add(
        rg.Response("label", "4", user_id="1b1e5f4e-0000-4000-8000-00000000000a")
    )
    records[0]._model.status = "completed"
    JsonIO.to_json(records, tmp_path / "back.argilla.json")
    result = import_labels(run, tmp_path / "back.argilla.json", "ana")
    assert (result.added, result.empty) == (1, 2)
    assert run.ledger().entries()[0]["annotator"] == "1b1e5f4e-0000-4000-8000-00000000000a"


# Parquet


def test_parquet_of_other_peoples_making_is_read_or_told(tmp_path):
    path = tmp_path / "q.parquet"
    pq.write_table(pa.table({"pt_id": ["a", None], "label": [4, 5]}), path)
    faults: list[Fault] = []
    assert [f.label for f in read_annotations(path, "parquet", faults)] == ["4"]
    assert faults[0].where == "row 2"
    pq.write_table(pa.table({"id": ["a"]}), path)
    with pytest.raises(PivotTraceError, match="no column pt_id, label; its columns are id"):
        read_annotations(path, "parquet")
    path.write_bytes(b"PAR1")
    with pytest.raises(PivotTraceError, match="not a readable Parquet"):
        read_annotations(path, "parquet")
