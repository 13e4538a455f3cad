"""verl's reward function: one rollout, four outcomes, the same keys in every row."""

import pytest

from pivottrace_verl import answer_pool
from pivottrace_verl.training.reward import compute_score

KEYS = {"score", "acc", "pred", "parsed", "timed_out"}


@pytest.fixture(autouse=True, scope="module")
def one_worker():
    answer_pool.set_limits(answer_pool.Limits(workers=1, seconds=2.0))
    yield
    answer_pool.close()


@pytest.mark.parametrize(
    ("text", "label", "score", "parsed", "timed_out"),
    [
        (r"\boxed{\frac{1}{2}}", "0.5", 1.0, 1.0, 0.0),
        (r"\boxed{3}", "0.5", 0.0, 1.0, 0.0),
        ("I do not know", "0.5", 0.0, 0.0, 0.0),
        (r"\boxed{9^{9^{9^{9}}}}", "0.5", 0.0, 1.0, 1.0),
        (r"\boxed{\binom{100000000}{50000000}}", "0.5", 0.0, 0.0, 1.0),
        (r"\boxed{3}", None, 0.0, 1.0, 0.0),
        (r"\boxed{\binom{100000000}{50000000}}", None, 0.0, 0.0, 1.0),
        ("I do not know", None, 0.0, 0.0, 0.0),
    ],
)
def test_right_wrong_unparseable_and_timed_out_are_told_apart(
    text, label, score, parsed, timed_out
):
    row = compute_score("any", text, label)
    assert set(row) == KEYS
    assert (row["score"], row["acc"]) == (score, score)
    assert (row["parsed"], row["timed_out"]) == (parsed, timed_out)
    assert isinstance(row["pred"], str) and bool(row["pred"]) == bool(parsed)
