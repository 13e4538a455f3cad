"""Bad input: one sentence, and every file as it was."""

import errno
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pivottrace_verl.annotation import export_queue, import_labels
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.pool import RunDir
from pivottrace_verl.prompts import read_pool, read_validation

CHAT = [{"role": "user", "content": "q"}]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def is_one_sentence(error) -> bool:
    text = str(error.value)
    return text.endswith(".") and "\n" not in text and "Traceback" not in text


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.jsonl", b"", "holds no prompts"),
        ("blank.jsonl", b"\n\n", "holds no prompts"),
        ("text.jsonl", b'{"prompt": "What is 1+1?"}\n', "row 1 .* not a chat"),
        ("none.jsonl", b'{"prompt": null}\n', "not a chat"),
        ("nothing.jsonl", b'{"prompt": []}\n', "is empty"),
        ("role.jsonl", b'{"prompt": [{"content": "q"}]}\n', "role and content"),
        ("image.jsonl", b'{"prompt": [{"role": "user", "content": [1]}]}\n', "role and content"),
        (
            "tool.jsonl",
            b'{"prompt": [{"role": "user", "content": "q", "tool_calls": [1]}]}\n',
            "tool_calls",
        ),
        ("key.jsonl", b'{"question": "q"}\n', "Line 1 .* 'prompt'"),
        ("list.jsonl", b"[1]\n", "Line 1"),
        ("torn.jsonl", b'{"prompt": [{"role": "us', "Line 1 .* not JSON"),
        ("latin.jsonl", b'{"prompt": "\xe9\xff"}\n', "not JSON"),
        ("deep.jsonl", b"[" * 100_000, "Line 1 .* not JSON"),
        ("half.jsonl", b'{"prompt": [{"role": "user", "content": "\\ud800"}]}\n', "Unicode"),
        ("source.jsonl", b'{"prompt": [{"role":"u","content":"q"}], "data_source": 3}', "int"),
        ("noise.parquet", b"this is no parquet file at all", "cannot be read"),
        ("nil.parquet", b"", "cannot be read"),
        ("pool.xlsx", b"", "neither a .parquet nor a .jsonl"),
    ],
)
def test_a_bad_pool_is_refused_in_a_sentence_and_no_run_appears(
    tmp_path, model, name, content, said
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PivotTraceError, match=said) as error:
        RunDir.create(tmp_path / "run", tmp_path / name, model)
    assert is_one_sentence(error)
    assert name in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_parquet_pool_without_prompts_or_with_strings_is_refused(tmp_path):
    pq.write_table(pa.table({"question": ["q"]}), tmp_path / "q.parquet")
    with pytest.raises(PivotTraceError, match="no column 'prompt', only question"):
        read_pool(tmp_path / "q.parquet")
    pq.write_table(pa.table({"prompt": ["q"]}), tmp_path / "s.parquet")
    with pytest.raises(PivotTraceError, match="not a chat: it is a str"):
        read_pool(tmp_path / "s.parquet")
    pq.write_table(pa.Table.from_pylist([{"prompt": CHAT}]).slice(0, 0), tmp_path / "e.parquet")
    with pytest.raises(PivotTraceError, match="holds no prompts"):
        read_pool(tmp_path / "e.parquet")


def test_a_torn_parquet_file_is_refused(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"prompt": CHAT}] * 50), tmp_path / "p.parquet")
    content = (tmp_path / "p.parquet").read_bytes()
    (tmp_path / "p.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(PivotTraceError, match=r"p\.parquet cannot be read") as error:
        read_pool(tmp_path / "p.parquet")
    assert is_one_sentence(error)


def test_a_missing_file_and_a_folder_that_is_no_data_set_are_refused(tmp_path):
    with pytest.raises(PivotTraceError, match=r"none\.jsonl cannot be read: no such file"):
        read_pool(tmp_path / "none.jsonl")
    with pytest.raises(PivotTraceError, match=r"none\.parquet cannot be read"):
        read_pool(tmp_path / "none.parquet")
    (tmp_path / "folder").mkdir()
    with pytest.raises(PivotTraceError, match="save_to_disk"):
        read_pool(tmp_path / "folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": CHAT}])
    path.chmod(0)
    with pytest.raises(PivotTraceError, match="permission denied"):
        read_pool(path)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": CHAT}], "row 1 .* no label"),
        ([{"prompt": CHAT, "label": " "}], "no label"),
        ([{"prompt": CHAT, "label": "1"}, {"prompt": CHAT, "label": "2"}], "row 2 .*'2'.*'1'"),
        ([], "no validation prompts"),
    ],
)
def test_validation_data_without_a_clear_label_is_refused(tmp_path, rows, said):
    with pytest.raises(PivotTraceError, match=said) as error:
        read_validation(write_jsonl(tmp_path / "v.jsonl", rows))
    assert is_one_sentence(error)


def test_a_folder_that_is_no_model_is_refused(tmp_path, model):
    pool = write_jsonl(tmp_path / "p.jsonl", [{"prompt": CHAT}])
    with pytest.raises(PivotTraceError, match=r"nowhere.*no such file") as error:
        RunDir.create(tmp_path / "run", pool, tmp_path / "nowhere")
    assert is_one_sentence(error)
    (model / "model.safetensors").unlink()
    with pytest.raises(PivotTraceError, match="no weight file"):
        RunDir.create(tmp_path / "run", pool, model)
    with pytest.raises(PivotTraceError, match="answers kind 'poems'"):
        RunDir.create(tmp_path / "run", pool, model, answers_kind="poems")
    assert not (tmp_path / "run").exists()


def test_a_run_directory_made_from_something_else_is_refused_and_both_sides_named(
    tmp_path, make_run, model
):
    run = make_run()
    pool = tmp_path / "run-pool.jsonl"
    before = snapshot(run.path)
    other_pool = write_jsonl(tmp_path / "other.jsonl", [{"prompt": CHAT}])
    with pytest.raises(PivotTraceError, match="another pool") as error:
        RunDir.create(run.path, other_pool, model, answers_kind="exact")
    assert run.manifest["pool"]["fingerprint"] in str(error.value)
    assert str(pool) in str(error.value)
    assert str(other_pool) in str(error.value)
    assert is_one_sentence(error)

    with pytest.raises(PivotTraceError, match=r"another answers: exact there, math here"):
        RunDir.create(run.path, pool, model, answers_kind="math")
    val = write_jsonl(tmp_path / "v.jsonl", [{"prompt": CHAT, "label": "1"}])
    with pytest.raises(PivotTraceError, match="another val: none there"):
        RunDir.create(run.path, pool, model, val_file=val, answers_kind="exact")

    (model / "model.safetensors").write_bytes(b"trained further")
    with pytest.raises(PivotTraceError, match="another model") as error:
        RunDir.create(run.path, pool, model, answers_kind="exact")
    assert run.manifest["model"]["fingerprint"] in str(error.value)
    assert snapshot(run.path) == before


def test_what_is_no_run_directory_is_refused(tmp_path):
    with pytest.raises(PivotTraceError, match="not a run directory"):
        RunDir.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 7}')
    with pytest.raises(PivotTraceError, match="format 7"):
        RunDir.open(tmp_path)
    (tmp_path / "manifest.json").write_text('{"for')
    with pytest.raises(PivotTraceError, match="not a JSON file") as error:
        RunDir.open(tmp_path)
    assert is_one_sentence(error)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(PivotTraceError, match="not a run's manifest"):
        RunDir.open(tmp_path)


def test_a_run_directory_where_a_file_is_in_the_way_is_refused(tmp_path, model):
    pool = write_jsonl(tmp_path / "p.jsonl", [{"prompt": CHAT}])
    (tmp_path / "run").write_text("a file")
    with pytest.raises(PivotTraceError, match="cannot be made"):
        RunDir.create(tmp_path / "run", pool, model)
    assert (tmp_path / "run").read_text() == "a file"


# A full disk

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_every_file_as_it_was_and_nothing_half_written(
    make_run, score_row, tmp_path, monkeypatch, call
):
    run = make_run()
    rows = [score_row(p.pt_id) for p in run.pool()]
    run.write_score_part(0, rows)
    run.merge_scores()
    run.ledger().append(
        [
            {
                "pt_id": rows[0]["pt_id"],
                "label": "1",
                "annotator": "ana",
                "source_file": "f",
                "purpose": "probe",
            }
        ]
    )
    labels = tmp_path / "labels.csv"
    labels.write_text(f"pt_id,label\n{rows[1]['pt_id']},2\n")
    before = snapshot(tmp_path)

    def full(*args, **kwargs):
        raise FULL

    monkeypatch.setattr(os, call, full)
    writes = [
        lambda: run.update_manifest(seed=1),
        lambda: run.write_score_part(0, rows[:1]),
        lambda: run.write_score_part(1, rows[:1]),
        run.merge_scores,
        lambda: run.write_probes("entropy", 0, []),
        lambda: run.write_plan([], {}),
        lambda: export_queue(run, [rows[1]["pt_id"]], tmp_path / "q.csv"),
    ]
    if call == "fsync":
        writes.append(lambda: import_labels(run, labels, "ana", "probe"))
    for write in writes:
        with pytest.raises(PivotTraceError, match="no space is left on the device") as error:
            write()
        assert is_one_sentence(error)
        assert snapshot(tmp_path) == before


def test_a_full_disk_at_creation_leaves_no_run_and_creation_can_be_repeated(
    tmp_path, model, monkeypatch
):
    pool = write_jsonl(tmp_path / "p.jsonl", [{"prompt": CHAT}])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(FULL))
        with pytest.raises(PivotTraceError, match="no space"):
            RunDir.create(tmp_path / "run", pool, model)
    with pytest.raises(PivotTraceError, match="not a run directory"):
        RunDir.open(tmp_path / "run")
    assert len(RunDir.create(tmp_path / "run", pool, model).pool()) == 1


# Label files


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "pt_id,label\nstranger,1\n{a},1\n", r"1 rows .* \(first: line 2: 'stranger'\)"),
        ("a.csv", "pt_id,label\n{a},1+2\n{b},one\n{c},2+\n", r"2 labels .* line 3: 'one'"),
        ("a.csv", "pt_id,label\n{a},1\nx,1\n{b},?\n", "1 rows name .*; 1 labels cannot"),
        ("a.csv", "pt_id,label\n{a},1\n{a},2\n", "1 prompts have two .* line 3: '2' after '1'"),
        ("a.csv", "pt_id,answer\n{a},1\n", "no column label; its columns are pt_id, answer"),
        ("a.csv", "", "no column pt_id, label; its columns are none"),
        ("a.csv", "pt_id,label\n{a},1,2\n", "Line 2 .* 3 cells"),
        ("a.csv", 'pt_id,label\n{a},"1\n', "not a readable CSV"),
        ("a.csv", b"pt_id,label\n\xff\xfe,1\n", "not UTF-8"),
        ("a.jsonl", '{{"pt_id": "{a}", "label": "1"}}\n{{"pt_', "Line 2 .* not JSON"),
        ("a.jsonl", '{{"pt_id": "{a}"}}\n', "Line 1 .* no label"),
        ("a.jsonl", '{{"pt_id": "{a}", "label": true}}\n', "1 labels cannot"),
        ("a.jsonl", '{{"pt_id": "{a}", "label": ["1"]}}\n', "1 labels cannot"),
        ("a.jsonl", '{{"pt_id": ["x"], "label": "1"}}\n', "Line 1 .* pt_id that is not text"),
        ("a.jsonl", '{{"pt_id": "{a}", "label": "\\ud800"}}\n', "1 labels cannot"),
        ("a.jsonl", "[" * 100_000, "Line 1 .* not JSON"),
        ("a.jsonl", "[]\n", "Line 1"),
        ("a.txt", "", "neither a .jsonl nor a .csv"),
    ],
)
def test_a_bad_label_file_is_refused_whole_and_the_ledger_is_as_it_was(
    tmp_path, make_run, name, content, said
):
    run = make_run(answers_kind="expression")
    a, b, c, d = (p.pt_id for p in run.pool()[:4])
    good = tmp_path / "good.csv"
    good.write_text(f"pt_id,label\n{d},7\n")
    import_labels(run, good, "ana", "probe")
    before = snapshot(run.path)
    content = content if isinstance(content, bytes) else content.format(a=a, b=b, c=c).encode()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PivotTraceError, match=said) as error:
        import_labels(run, tmp_path / name, "ana", "probe")
    assert is_one_sentence(error)
    assert name in str(error.value)
    assert snapshot(run.path) == before


def test_a_missing_label_file_a_bad_purpose_and_a_bad_cost_are_refused(tmp_path, make_run):
    run = make_run()
    with pytest.raises(PivotTraceError, match="no such file"):
        import_labels(run, tmp_path / "none.csv", "ana", "probe")
    (tmp_path / "a.csv").write_text("pt_id,label\n")
    with pytest.raises(PivotTraceError, match="'fun'"):
        import_labels(run, tmp_path / "a.csv", "ana", "fun")
    for cost in (-1.0, float("nan"), float("inf")):
        with pytest.raises(PivotTraceError, match="cost"):
            import_labels(run, tmp_path / "a.csv", "ana", "probe", cost)
    assert not run.ledger().path.exists()


def test_an_export_of_unknown_or_repeated_prompts_is_refused(tmp_path, make_run):
    run = make_run()
    a = run.pool()[0].pt_id
    for ids, said in (([a, "stranger"], "stranger"), ([a, a], "more than once")):
        with pytest.raises(PivotTraceError, match=said):
            export_queue(run, ids, tmp_path / "q.csv")
    with pytest.raises(PivotTraceError, match=r"q\.pdf"):
        export_queue(run, [a], tmp_path / "q.pdf")
    assert not list(tmp_path.glob("q.*"))


def test_an_export_never_overwrites_labels_that_were_not_imported(tmp_path, make_run):
    run = make_run()
    a, b = (p.pt_id for p in run.pool()[:2])
    path = tmp_path / "q.csv"
    path.write_text(f"pt_id,label\n{a},work\n{b},\n")
    with pytest.raises(PivotTraceError, match="1 labels that are not imported"):
        export_queue(run, [b], path)
    import_labels(run, path, "ana", "annotate")
    assert export_queue(run, [b], path) == 1


def test_labels_of_a_torn_ledger_can_be_imported_again(tmp_path, make_run):
    run = make_run()
    a, b = (p.pt_id for p in run.pool()[:2])
    path = tmp_path / "q.csv"
    path.write_text(f"pt_id,label\n{a},1\n{b},2\n")
    import_labels(run, path, "ana", "probe")
    ledger = run.ledger().path
    ledger.write_bytes(ledger.read_bytes()[:-10])
    with pytest.warns(UserWarning, match="line 2"):
        result = import_labels(run, path, "ana", "probe")
    assert (result.added, result.already) == (1, 1)
    with pytest.warns(UserWarning, match="line 2"):
        assert run.ledger().labels() == {a: "1", b: "2"}
