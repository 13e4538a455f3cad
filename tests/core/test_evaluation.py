"""Accuracy over given rollouts: what is right, unparseable or timed out is counted as that."""

import pytest

from pivottrace_verl.answers import TIMED_OUT
from pivottrace_verl.calibration import outcomes
from pivottrace_verl.evaluation import accuracy
from pivottrace_verl.generation import Rollout


class Slow:
    """A kind whose answers are their texts; `hang` times out when read, `hard` when compared."""

    def __init__(self):
        self.calls = 0

    def extract_many(self, texts):
        self.calls += 1
        return [None if text == "" else TIMED_OUT if text == "hang" else text for text in texts]

    def equal_many(self, pairs):
        self.calls += 1
        return [TIMED_OUT if "hard" in pair else pair[0] == pair[1] for pair in pairs]

    def canonical_many(self, labels):
        return list(labels)

    def extract(self, text):
        raise AssertionError("asked one at a time")

    equal = canonical = extract


def rollouts(*texts, truncated=False):
    return [Rollout([0] * (i + 1), t, truncated, -0.5, None) for i, t in enumerate(texts)]


def test_rollouts_are_counted_with_the_label_of_their_prompt():
    sampled = rollouts("Answer: 1", "Answer: 2", "Answer: 2", "nothing")
    found = accuracy(sampled, rollouts("Answer: 2", "Answer: 2"), ["1", "2"], answers="expression")
    assert found == {
        "n": 2,
        "samples": 2,
        "mean": 0.5,
        "greedy": 0.5,
        "unparseable": 0.25,
        "timed_out": 0.0,
        "truncated": 0.0,
        "tokens_mean": 2.5,
    }


def test_what_timed_out_is_neither_right_nor_unparseable_and_all_is_asked_at_once():
    kind = Slow()
    sampled = rollouts("hang", "1", "hard", "")
    found = accuracy(sampled, rollouts("hard", "2"), ["1", "2"], answers=kind)
    assert (found["mean"], found["greedy"]) == (0.25, 0.5)
    assert (found["timed_out"], found["unparseable"]) == (0.5, 0.25)
    assert kind.calls == 2


@pytest.mark.parametrize("majority", ["hard", None])
def test_a_probes_answer_that_timed_out_against_its_label_is_not_right(majority):
    answers = [{"answer": "hard", "count": 5}, {"answer": "1", "count": 2}]
    row = {"pt_id": "a", "n_rollouts": 8, "answers": answers, "majority": majority}
    kind = Slow()
    (outcome,) = outcomes([row], {"a": "1"}, kind)
    assert (outcome.pass_rate, outcome.majority_right) == (0.25, False)
    assert kind.calls == 1


def test_a_majority_is_right_whatever_its_spelling():
    answers = [{"answer": "3 + 1", "count": 3}, {"answer": "3", "count": 1}]
    row = {"pt_id": "a", "n_rollouts": 4, "answers": answers, "majority": "3 + 1"}
    (outcome,) = outcomes([row], {"a": "1+3"}, "expression")
    assert (outcome.pass_rate, outcome.majority_right) == (0.75, True)
