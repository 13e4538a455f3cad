"""The self-test behind `pivottrace doctor` measures what it says, on the installed vLLM."""

import pytest

from pivottrace_verl.attention.config import ENV_DISABLE
from pivottrace_verl.attention.selftest import (
    N_TOKENS,
    PROMPT_LENGTHS,
    make_tiny_model,
    run_selftest,
)
from pivottrace_verl.errors import PivotTraceError


@pytest.mark.vllm
def test_the_self_test_finds_capture_equal_to_dense_attention():
    result = run_selftest()
    assert result["backend"] == "CPU_ATTN"
    assert result["rows"] == N_TOKENS * len(PROMPT_LENGTHS)
    assert result["missing"] == 0
    assert result["max_abs_error"] <= 1e-4
    assert result["greedy_identical"] is True


@pytest.mark.vllm
def test_soft_caps_are_captured_and_sliding_layers_passed_over(tmp_path):
    make_tiny_model(tmp_path, "gemma2")
    result = run_selftest(tmp_path)
    assert result["layers"] == [1, 3]
    assert result["rows"] == N_TOKENS * len(PROMPT_LENGTHS)
    assert result["max_abs_error"] <= 1e-4
    assert result["greedy_identical"] is True


def test_a_model_that_is_not_there_is_told_in_one_sentence(tmp_path):
    with pytest.raises(PivotTraceError, match="no Hugging Face model"):
        run_selftest(tmp_path)


@pytest.mark.vllm
def test_a_child_that_fails_is_told_by_its_last_words(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(PivotTraceError, match=r"self-test failed: .*no-such-architecture"):
        run_selftest(tmp_path)


def test_the_kill_switch_is_named_when_it_stands_in_the_way(monkeypatch):
    monkeypatch.setenv(ENV_DISABLE, "1")
    with pytest.raises(PivotTraceError, match="switches the capture off"):
        run_selftest()
