"""The run directory: what goes in, what is on disk, what a reader is told."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.files import model_fingerprint
from pivottrace_verl.pool import RunDir
from pivottrace_verl.prompts import pt_id, read_pool, render
from tests.score_table import score_row


def chat(text):
    return [{"role": "user", "content": text}]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def score_all(run, parts=3):
    rows = [score_row(prompt.pt_id) for prompt in run.pool()]
    for i, part in enumerate(np.array_split(np.arange(len(rows)), parts)):
        run.write_score_part(i, [rows[k] for k in part])
    run.merge_scores()


# Prompts in


def test_a_prompt_id_is_the_hash_of_canonical_json():
    import hashlib

    text = '{"data_source":"s","prompt":[{"content":"é","role":"user"}]}'
    expected = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert pt_id([{"role": "user", "content": "é"}], "s") == expected
    assert pt_id([{"content": "é", "role": "user"}], "s") == expected
    assert pt_id([{"role": "user", "content": "é"}], "t") != expected


def test_all_three_formats_give_the_same_prompts(tmp_path):
    rows = [
        {"prompt": chat("a"), "data_source": "s"},
        {"prompt": [{"role": "system", "content": "x"}, *chat("b")], "data_source": "s"},
    ]
    from_jsonl = read_pool(write_jsonl(tmp_path / "p.jsonl", rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert read_pool(tmp_path / "p.parquet") == from_jsonl
    folder = tmp_path / "saved"
    folder.mkdir()
    table = pa.Table.from_pylist([{"answer": "42", **row} for row in rows])
    with pa.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})
    )
    assert read_pool(folder) == from_jsonl


def test_a_pool_without_data_source_gets_the_default(tmp_path):
    found = read_pool(write_jsonl(tmp_path / "p.jsonl", [{"prompt": chat("a")}]))
    assert [p.data_source for p in found.prompts] == ["pool"]


def test_duplicates_are_merged_counted_and_the_first_row_is_remembered(tmp_path, model):
    rows = [{"prompt": chat(t)} for t in "abacab"] + [{"prompt": chat("a"), "data_source": "other"}]
    pool = write_jsonl(tmp_path / "p.jsonl", rows)
    run = RunDir.create(tmp_path / "run", pool, model)
    assert [p.messages[0]["content"] for p in run.pool()] == ["a", "b", "c", "a"]
    assert run.manifest["pool"]["duplicates_merged"] == 3
    assert run.manifest["pool"]["n_prompts"] == 4
    table = pq.read_table(tmp_path / "run" / "pool.parquet")
    assert [json.loads(e)["index"] for e in table["extra_info"].to_pylist()] == [0, 1, 3, 6]


def test_a_single_user_message_is_rendered_as_it_is_and_a_dialogue_with_its_roles():
    assert render(chat("hi")) == "hi"
    assert render([{"role": "system", "content": "s"}, *chat("u")]) == "[system]\ns\n\n[user]\nu"


# Label privacy

ANSWERS = ("reward_model", "extra_info", "answer", "solution", "label")


def pool_rows(secret):
    return [
        {
            "prompt": chat(f"q{i}"),
            "data_source": "s",
            "reward_model": {"style": "rule", "ground_truth": secret(i)},
            "extra_info": {"index": i, "answer": secret(i)},
            "answer": secret(i),
            "solution": secret(i),
            "label": secret(i),
        }
        for i in range(20)
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_poisoned_answers_change_no_byte_of_the_run(tmp_path, model, suffix):
    secrets = {
        "true": str,
        "poison": lambda i: f"</answer>=cmd|{i * 7919}" * 3,
        "null": lambda i: None,
    }
    runs = {}
    for name, secret in secrets.items():
        folder = tmp_path / name
        folder.mkdir()
        file = folder / f"pool.{suffix}"
        if suffix == "jsonl":
            write_jsonl(file, pool_rows(secret))
        else:
            pq.write_table(pa.Table.from_pylist(pool_rows(secret)), file)
        run = RunDir.create(folder / "run", file, model)
        manifest = run.manifest
        assert manifest["pool"].pop("source") == str(file)
        content = (run.path / "pool.parquet").read_bytes()
        assert b"cmd" not in content
        runs[name] = (content, manifest, sorted(p.name for p in run.path.iterdir()))
    assert runs["true"] == runs["poison"] == runs["null"]


def test_answer_columns_of_a_parquet_pool_are_not_even_read(tmp_path, model):
    file = tmp_path / "pool.parquet"
    pq.write_table(pa.Table.from_pylist(pool_rows(str)), file, compression="none")
    before = [p.pt_id for p in read_pool(file).prompts]
    meta = pq.ParquetFile(file).metadata.row_group(0)
    content = bytearray(file.read_bytes())
    for k in range(meta.num_columns):
        column = meta.column(k)
        if column.path_in_schema.split(".")[0] in ANSWERS:
            start = min(o for o in (column.dictionary_page_offset, column.data_page_offset) if o)
            content[start : start + column.total_compressed_size] = (
                b"\xff" * column.total_compressed_size
            )
    file.write_bytes(bytes(content))
    with pytest.raises(Exception):  # noqa: B017 - whatever pyarrow says, reading them is impossible
        pq.read_table(file)
    assert [p.pt_id for p in read_pool(file).prompts] == before


# Making and coming back


def test_the_same_inputs_reopen_the_run_and_change_nothing(tmp_path, make_run, model):
    run = make_run()
    run.update_manifest(settings={"score": {"n": 8}})
    before = {p.name: p.read_bytes() for p in run.path.iterdir()}
    again = make_run()
    assert again.manifest["settings"] == {"score": {"n": 8}}
    assert {p.name: p.read_bytes() for p in run.path.iterdir()} == before
    assert RunDir.open(run.path).pool() == run.pool()


def test_a_run_that_died_before_its_manifest_is_made_again(tmp_path, make_run):
    run = make_run()
    whole = (run.path / "manifest.json").read_bytes()
    (run.path / "manifest.json").unlink()
    (run.path / "pool.parquet").write_bytes(b"half")
    assert (make_run().path / "manifest.json").read_bytes() == whole
    assert len(make_run().pool()) == 12


def test_validation_prompts_keep_their_labels_and_overlap_with_the_pool_is_counted(tmp_path, model):
    pool = write_jsonl(tmp_path / "p.jsonl", [{"prompt": chat(t)} for t in "abc"])
    rows = [
        {"prompt": chat("c"), "label": 3},
        {"prompt": chat("d"), "reward_model": {"style": "rule", "ground_truth": " 4 "}},
        {"prompt": chat("d"), "label": "4"},
    ]
    val = write_jsonl(tmp_path / "v.jsonl", rows)
    run = RunDir.create(tmp_path / "run", pool, model, val_file=val)
    assert [(p.messages[0]["content"], label) for p, label in run.validation()] == [
        ("c", "3"),
        ("d", "4"),
    ]
    assert run.manifest["val"]["also_in_pool"] == 1
    assert run.manifest["val"]["duplicates_merged"] == 1
    assert len(run.pool()) == 3


def test_a_run_without_validation_data_has_none(make_run):
    assert make_run().validation() == []


def test_manifest_sections_are_merged_entry_by_entry(make_run):
    run = make_run()
    run.update_manifest(timings={"score": 1.0}, seed=3)
    run.update_manifest(timings={"train": 2.0}, seed=4)
    assert run.manifest["timings"] == {"score": 1.0, "train": 2.0}
    assert run.manifest["seed"] == 4


def test_the_model_fingerprint_sees_config_and_weights(model):
    first = model_fingerprint(model)
    assert model_fingerprint(model) == first
    (model / "config.json").write_text('{"model_type": "qwen3"}')
    second = model_fingerprint(model)
    (model / "model.safetensors").write_bytes(b"other")
    assert len({first, second, model_fingerprint(model)}) == 3


# Scores


def test_parts_merge_into_the_pools_order_with_the_same_bytes_whatever_order_they_came_in(make_run):
    files = []
    for order in ([0, 1, 2], [2, 0, 1]):
        run = make_run(name=f"run{order[0]}")
        rows = [score_row(p.pt_id, length_mean=float(i)) for i, p in enumerate(run.pool())]
        for i in order:
            run.write_score_part(i, rows[i * 4 : i * 4 + 4])
        assert run.finished_parts() == {0, 1, 2}
        run.merge_scores()
        assert run.scores()["length_mean"].to_pylist() == list(range(12))
        files.append((run.path / "scores.parquet").read_bytes())
    assert files[0] == files[1]


def test_scores_come_in_the_pools_order_even_if_the_parts_do_not(make_run):
    run = make_run()
    run.write_score_part(0, [score_row(p.pt_id) for p in reversed(run.pool())])
    run.merge_scores()
    assert run.scores()["pt_id"].to_pylist() == [p.pt_id for p in run.pool()]


def test_a_part_with_a_prompt_of_another_part_is_not_merged(make_run):
    run = make_run()
    rows = [score_row(p.pt_id) for p in run.pool()]
    run.write_score_part(0, [*rows[:5], rows[6]])
    run.write_score_part(1, [rows[5], *rows[7:]])
    with pytest.raises(PivotTraceError, match="not in the pool's order"):
        run.merge_scores()
    run.write_score_part(1, [*rows[5:6], *rows[7:], score_row("stranger")])
    with pytest.raises(PivotTraceError, match="1 scored prompts are not in the pool"):
        run.merge_scores()
    assert [p.name for p in run.path.iterdir() if "scores." in p.name] == []


def test_parts_of_another_version_are_not_merged(make_run):
    run = make_run()
    score_all(run)
    before = (run.path / "scores.parquet").read_bytes()
    path = run.path / "scores" / "part-00001.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["logprob_mean"]), path)
    with pytest.raises(PivotTraceError, match=r"part-00001\.parquet .* lacks logprob_mean"):
        run.merge_scores()
    assert (run.path / "scores.parquet").read_bytes() == before


def test_scores_are_merged_piece_by_piece_with_the_same_bytes_however_they_were_cut(
    make_run, monkeypatch
):
    monkeypatch.setattr("pivottrace_verl.files.ROW_GROUP", 5)
    contents = []
    for parts in (1, 2, 7, 12):
        run = make_run(name=f"run{parts}")
        rows = [score_row(p.pt_id, length_mean=float(i)) for i, p in enumerate(run.pool())]
        for i, part in enumerate(np.array_split(np.arange(12), parts)):
            run.write_score_part(i, [rows[k] for k in part])
        run.merge_scores()
        assert run.scores()["length_mean"].to_pylist() == list(range(12))
        contents.append((run.path / "scores.parquet").read_bytes())
    assert len(set(contents)) == 1
    groups = pq.ParquetFile(run.path / "scores.parquet").metadata
    assert [groups.row_group(i).num_rows for i in range(groups.num_row_groups)] == [5, 5, 2]


def test_scores_can_be_read_without_the_bulk_of_them(make_run):
    run = make_run()
    score_all(run)
    whole = run.scores()
    assert "rollouts" in whole.column_names
    assert run.scores(rollouts=False).equals(whole.drop_columns(["rollouts"]))


def test_a_resumed_run_ends_with_the_same_bytes_as_an_uninterrupted_one(make_run):
    whole, killed = make_run(name="whole"), make_run(name="killed")
    score_all(whole)
    rows = [score_row(p.pt_id) for p in killed.pool()]
    killed.write_score_part(0, rows[:4])
    (killed.path / "scores" / ".part-00001.parquet.123.tmp").write_bytes(b"half a part")
    resumed = RunDir.open(killed.path)
    for i in {0, 1, 2} - resumed.finished_parts():
        resumed.write_score_part(i, rows[i * 4 : i * 4 + 4])
    resumed.merge_scores()
    assert (whole.path / "scores.parquet").read_bytes() == (
        killed.path / "scores.parquet"
    ).read_bytes()


def test_incomplete_or_doubled_scores_are_not_merged(make_run):
    run = make_run()
    rows = [score_row(p.pt_id) for p in run.pool()]
    run.write_score_part(0, rows[:5])
    with pytest.raises(PivotTraceError, match="7 of 12"):
        run.merge_scores()
    run.write_score_part(1, rows[4:])
    with pytest.raises(PivotTraceError, match="scored twice"):
        run.merge_scores()
    assert not (run.path / "scores.parquet").exists()


def test_a_score_row_with_a_column_too_many_or_too_few_is_an_error(make_run):
    run = make_run()
    row = score_row(run.pool()[0].pt_id)
    for bad in ({**row, "mood": 1}, {k: v for k, v in row.items() if k != "majority"}):
        with pytest.raises(ValueError, match=r"mood|majority"):
            run.write_score_part(0, [bad])


def test_a_stage_that_was_not_run_is_named(make_run):
    run = make_run()
    for read, verb in (
        (run.scores, "score"),
        (run.probes, "probe"),
        (run.plan, "triage"),
        (run.triage, "triage"),
        (lambda: run.stage_fingerprint("scores"), "score"),
    ):
        with pytest.raises(PivotTraceError, match=f"`pivottrace {verb}`"):
            read()


def test_probes_and_plan_are_refused_when_the_scores_have_changed(make_run):
    run = make_run()
    score_all(run)
    run.write_probes("entropy", 0, ["a"])
    same = {"route": "drop", "uncertainty": 0.0, "rank": 1, "reason": "x", "cost": 1.0}
    plan = [{"pt_id": p.pt_id, **same} for p in run.pool()]
    run.write_plan(plan, {"estimator": "entropy"})
    assert run.probes()["pt_ids"] == ["a"]
    assert run.plan().to_pylist() == plan
    assert run.triage()["estimator"] == "entropy"
    before = run.stage_fingerprint("scores")
    assert run.triage()["made_from"]["scores"] == before
    rows = [score_row(p.pt_id, length_mean=99.0) for p in run.pool()]
    for i in range(3):
        run.write_score_part(i, rows[i * 4 : i * 4 + 4])
    run.merge_scores()
    for read in (run.probes, run.plan):
        with pytest.raises(PivotTraceError) as error:
            read()
        assert before in str(error.value)
        assert run.stage_fingerprint("scores") in str(error.value)


def test_scores_of_another_pool_are_refused(make_run):
    run, other = make_run(name="a"), make_run(n=13, name="b")
    score_all(other)
    (run.path / "scores.parquet").write_bytes((other.path / "scores.parquet").read_bytes())
    with pytest.raises(PivotTraceError) as error:
        run.scores()
    assert run.stage_fingerprint("pool") in str(error.value)
    assert other.stage_fingerprint("pool") in str(error.value)


# The lock


def test_a_second_process_is_refused_while_the_first_holds_the_run_and_welcome_after(make_run):
    run = make_run()
    code = (
        "import sys\n"
        "from pivottrace_verl.pool import RunDir\n"
        "from pivottrace_verl.errors import PivotTraceError\n"
        "try:\n"
        "    with RunDir.open(sys.argv[1]).lock(): print('held')\n"
        "except PivotTraceError as error: print(error)\n"
    )

    def other():
        root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
        return subprocess.run(
            [sys.executable, "-c", code, str(run.path)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": root},
        ).stdout.strip()

    with run.lock():
        said = other()
        assert f"pid {os.getpid()}" in said
        assert str(run.path) in said
    assert other() == "held"


def test_a_folder_is_held_apart_from_the_run_so_labels_can_come_in_while_training_runs(make_run):
    run = make_run()
    told = pytest.raises(PivotTraceError, match=r"working on the run directory .*/train\.")
    with run.lock("train"), run.lock(), told:
        run.lock("train").__enter__()


def test_a_lock_is_waited_for_as_long_as_asked(make_run):
    run = make_run()
    with run.lock():
        start = time.monotonic()
        with pytest.raises(PivotTraceError, match="Another process"):
            run.lock(wait=0.3).__enter__()
        assert time.monotonic() - start >= 0.3


def test_the_lock_is_given_back_after_an_error(make_run):
    run = make_run()
    with pytest.raises(RuntimeError), run.lock():
        raise RuntimeError
    with run.lock():
        pass


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=6))
def test_any_text_survives_the_way_into_the_run_and_out(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("pool")
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "w.safetensors").write_bytes(b"w")
    rows = [{"prompt": chat(text), "data_source": source} for text, source in pairs]
    run = RunDir.create(folder / "run", write_jsonl(folder / "p.jsonl", rows), model)
    found = {(p.messages[0]["content"], p.data_source) for p in run.pool()}
    assert found == set(pairs)
    assert run.manifest["pool"]["duplicates_merged"] == len(pairs) - len(found)
