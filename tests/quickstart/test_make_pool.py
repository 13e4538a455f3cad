"""Pool, validation and answers files."""

import json

import make_pool
import pytest
import tasks

from pivottrace_verl.prompts import pt_id, read_pool


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("data")
    make_pool.main(["--out", str(out), "--n-pool", "30", "--n-val", "10"])
    return out


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_pool_holds_distinct_prompts_and_no_answers(folder):
    pool = read_pool(folder / "pool.jsonl")
    assert len(pool.prompts) == 30
    assert pool.duplicates == 0
    labels = {row["label"] for row in rows(folder / "answers.jsonl")}
    for row in rows(folder / "pool.jsonl"):
        assert set(row) == {"prompt", "data_source", "extra_info"}
        assert not labels & {str(value) for value in row["extra_info"].values()}


def test_every_prompt_of_the_pool_has_one_answer_under_its_id(folder):
    ids = [pt_id(row["prompt"], row["data_source"]) for row in rows(folder / "pool.jsonl")]
    assert [row["pt_id"] for row in rows(folder / "answers.jsonl")] == ids


def test_validation_shares_no_problem_with_the_pool(folder):
    def keys(path):
        return {
            (*sorted(row["extra_info"]["numbers"]), row["extra_info"]["target"])
            for row in rows(path)
        }

    assert len(keys(folder / "val.jsonl")) == 10
    assert not keys(folder / "val.jsonl") & keys(folder / "pool.jsonl")
    assert all(row["label"] for row in rows(folder / "val.jsonl"))


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_prompts(folder, tmp_path):
    make_pool.main(["--out", str(tmp_path / "a"), "--n-pool", "30", "--n-val", "10"])
    make_pool.main(["--out", str(tmp_path / "b"), "--n-pool", "30", "--n-val", "10", "--seed", "1"])
    for name in ("pool.jsonl", "val.jsonl", "answers.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (folder / name).read_bytes()
        assert (tmp_path / "b" / name).read_bytes() != (folder / name).read_bytes()


def test_labels_are_canonical(folder):
    kind = tasks.get_answers(tasks.ANSWERS)
    for row in rows(folder / "answers.jsonl"):
        assert kind.canonical(row["label"]) == row["label"]
