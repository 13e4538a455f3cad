"""The policy's tokenizer, its model, and the folder they are saved in."""

import json
import random

import make_policy
import pytest
import tasks
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = ["--small", "--steps", "1"]


@pytest.fixture(scope="module")
def tokenizer():
    return make_policy.build_tokenizer()


@pytest.fixture(scope="module")
def problems():
    return tasks.draw(40, seed=9, for_training=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "policy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(make_policy.SMALL, "fact_steps", 1)
        patch.setitem(make_policy.SMALL, "problems", 30)
        make_policy.main(["--out", str(out), *TINY])
        yield out


def prompt_ids(tokenizer, problem):
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": problem.prompt}],
        add_generation_prompt=True,
        return_dict=False,
    )


def test_prompts_are_short_known_words_and_end_where_the_answer_begins(tokenizer, problems):
    for problem in problems:
        ids = prompt_ids(tokenizer, problem)
        assert len(ids) <= 40
        assert tokenizer.unk_token_id not in ids
        assert ids[-1] == tokenizer.convert_tokens_to_ids("<|assistant|>")


def test_a_worked_solution_survives_the_tokenizer(tokenizer, problems):
    rng = random.Random(0)
    for problem in problems:
        text = tasks.worked_solution(problem, rng, tasks.Carelessness())
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.split())
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_a_conversation_renders_the_same_with_and_without_its_last_answer(tokenizer):
    user = {"role": "user", "content": "Calculate 7"}
    answer = {"role": "assistant", "content": "7"}
    opened = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([user, answer], tokenize=False)
    assert whole == opened + "7<|end|>"


def test_targets_are_the_answer_tokens_one_position_early(tokenizer):
    settings = make_policy.Settings(problems=20, batch=4)
    rows = make_policy.batches(settings, tokenizer, tasks.Carelessness(), seed=0)
    tokens, targets = next(rows)
    for row, wanted in zip(tokens, targets, strict=True):
        (positions,) = torch.where(wanted != -100)
        assert torch.equal(wanted[positions], row[positions + 1])
        assert row[positions[0]] == tokenizer.convert_tokens_to_ids("<|assistant|>")
        assert wanted[positions[-1]] == tokenizer.eos_token_id


def test_fact_targets_are_results(tokenizer):
    tokens, targets = next(make_policy.fact_batches(make_policy.Settings(batch=2), tokenizer))
    for row, wanted in zip(tokens, targets, strict=True):
        words = tokenizer.convert_ids_to_tokens(row)
        for position in torch.where(wanted != -100)[0].tolist():
            left, op, right, equals = words[position - 3 : position + 1]
            assert equals == "="
            assert eval(f"{left} {op} {right}") == int(words[position + 1])  # noqa: S307


def test_careful_demonstrations_come_first_and_careless_ones_last(tokenizer, monkeypatch):
    seen = []

    def batches(settings, tokenizer, carelessness, seed):
        for rows in original(settings, tokenizer, carelessness, seed):
            seen.append(carelessness)
            yield rows

    original = make_policy.batches
    monkeypatch.setattr(make_policy, "batches", batches)
    settings = make_policy.Settings(
        fact_steps=2, steps=5, careless_steps=2, problems=10, batch=2, hidden=64, intermediate=64
    )
    make_policy.train(settings, tokenizer)
    careless = tasks.Carelessness()
    assert seen == [tasks.careful(careless)] * 3 + [careless] * 2


def test_the_folder_loads_in_hugging_face_format(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "llama"
    assert model.config.head_dim >= 32
    assert model.config.vocab_size % 64 == 0
    assert model.config.vocab_size == len(tokenizer)
    for config in (model.config, model.generation_config):
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.chat_template


def test_a_policy_that_is_there_is_not_made_again(folder, capsys):
    before = (folder / "policy.json").stat().st_mtime_ns
    make_policy.main(["--out", str(folder), *TINY])
    assert "already holds" in capsys.readouterr().out
    assert (folder / "policy.json").stat().st_mtime_ns == before


def test_other_settings_replace_the_folder_and_leave_nothing_beside_it(folder):
    old = json.loads((folder / "policy.json").read_text())
    make_policy.main(["--out", str(folder), *TINY, "--seed", "1"])
    new = json.loads((folder / "policy.json").read_text())
    assert new["fingerprint"] != old["fingerprint"]
    assert new["settings"]["seed"] == 1
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_same_seed_gives_the_same_weights(folder, tmp_path):
    for out in (folder, tmp_path / "again"):
        make_policy.main(["--out", str(out), *TINY, "--seed", "2"])
    one, other = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (folder, tmp_path / "again")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_that_hits_the_time_limit_says_so(tokenizer):
    settings = make_policy.Settings(
        fact_steps=5, steps=1, problems=10, batch=2, hidden=64, time_limit=0.0
    )
    _, report = make_policy.train(settings, tokenizer)
    assert report["stopped_by_time_limit"] is True
    assert report["steps_done"] == 1
