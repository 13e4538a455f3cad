"""The self-test behind `pivottrace doctor` measures what it says, on the installed vLLM."""

import subprocess

import pytest

from pivottrace_verl.attention import selftest
from pivottrace_verl.attention.config import ENV_DISABLE
from pivottrace_verl.attention.selftest import (
    N_TOKENS,
    PROMPT_LENGTHS,
    make_tiny_model,
    run_selftest,
)
from pivottrace_verl.doctor import diagnose
from pivottrace_verl.errors import PivotTraceError


@pytest.mark.vllm
def test_the_self_test_finds_capture_equal_to_dense_attention():
    result = run_selftest()
    assert result["backend"] == "CPU_ATTN"
    assert result["rows"] == N_TOKENS * len(PROMPT_LENGTHS)
    assert result["missing"] == 0
    assert result["max_abs_error"] <= result["bound"] == 1e-4
    assert result["greedy_identical"] is True


@pytest.mark.vllm
def test_the_doctor_proves_a_model_with_soft_caps_and_passes_over_its_sliding_layers(tmp_path):
    make_tiny_model(tmp_path, "gemma2")
    found = diagnose(model=tmp_path)
    assert [check["ok"] for check in found["checks"] if check["name"] == "capture"] == [True]
    result = found["capture"]
    assert result["layers"] == [1, 3]
    assert result["rows"] == result["tokens"] == N_TOKENS * len(PROMPT_LENGTHS)
    assert result["max_abs_error"] <= 1e-4
    assert result["greedy_identical"] is True


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"max_abs_error": None, "missing": 4}, "None of 4 rollouts"),
        ({"rows": 9}, "9 of 10 tokens"),
        ({"missing": 1}, "1 rollouts missing"),
        ({"max_abs_error": 0.1}, "at most 1.0e-01"),
        ({"greedy_identical": False}, "DIFFERENT"),
    ],
)
def test_the_doctor_fails_a_capture_that_is_wrong_or_not_complete(monkeypatch, facts, says):
    good = {
        "backend": "CPU_ATTN", "layers": [1], "heads": None, "dtype": "float32", "bound": 1e-4,
        "max_abs_error": 1e-6, "rows": 10, "tokens": 10, "missing": 0, "greedy_identical": True,
    }  # fmt: skip
    for measured, ok in ((good, True), ({**good, **facts}, False)):
        monkeypatch.setattr(selftest, "run_selftest", lambda *_, m=measured: m)
        (check,) = [c for c in diagnose()["checks"] if c["name"] == "capture"]
        assert check["ok"] is ok
    assert says in check["says"]


def test_the_bound_is_that_of_the_number_format(monkeypatch):
    facts = {
        "backend": "FLASH_ATTN", "layers": [1], "heads": [[0, 2]], "dtype": "bfloat16",
        "bound": selftest.HALF_BOUND, "rows": 1, "tokens": 1, "missing": 0,
        "greedy_identical": True,
    }  # fmt: skip
    for error, ok in ((0.05, True), (0.7, False)):
        monkeypatch.setattr(
            selftest, "run_selftest", lambda *_, e=error: {**facts, "max_abs_error": e}
        )
        (check,) = [c for c in diagnose()["checks"] if c["name"] == "capture"]
        assert (check["ok"], "bound 0.2 in bfloat16" in check["says"]) == (ok, True)


def test_the_doctor_says_in_one_sentence_that_a_model_is_not_there(tmp_path):
    with pytest.raises(PivotTraceError, match="no Hugging Face model"):
        diagnose(model=tmp_path)


def test_a_model_that_is_not_there_is_told_in_one_sentence(tmp_path):
    with pytest.raises(PivotTraceError, match="no Hugging Face model"):
        run_selftest(tmp_path)


@pytest.mark.vllm
def test_a_child_that_fails_is_told_by_its_last_words(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(PivotTraceError, match=r"self-test failed: .*no-such-architecture"):
        run_selftest(tmp_path)


def test_a_child_that_says_nothing_of_its_end_is_told_by_its_status(monkeypatch):
    done = subprocess.CompletedProcess([], -9, stdout="", stderr="INFO: loading\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(PivotTraceError, match=r"self-test failed: it ended with status -9$"):
        run_selftest()


def test_the_kill_switch_is_named_when_it_stands_in_the_way(monkeypatch):
    monkeypatch.setenv(ENV_DISABLE, "1")
    with pytest.raises(PivotTraceError, match="switches the capture off"):
        run_selftest()
