"""Several annotators: the rules, and Krippendorff's alpha against published figures."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pivottrace_verl.annotation.agreement import agreement, classes, resolve
from pivottrace_verl.answers import get_answers

EXACT, EXPRESSION = get_answers("exact"), get_answers("expression")
answers = st.lists(st.sampled_from("abc"), min_size=1, max_size=6)

# Krippendorff (2011), example C: four observers, twelve units, missing values; nominal alpha .743.
PUBLISHED = [
    "1 1 . 1", "2 2 3 2", "3 3 3 3", "3 3 3 3", "2 2 2 2", "1 2 3 4",
    "4 4 4 4", "1 1 2 1", "2 2 2 2", ". 5 5 5", ". . 1 1", ". . 3 .",
]  # fmt: skip


def labels_of(unit):
    return [label for label in unit.split() if label != "."]


def test_alpha_is_the_published_one_missing_values_and_all():
    found = agreement([labels_of(unit) for unit in PUBLISHED], EXACT)
    assert found.alpha == pytest.approx(0.743, abs=5e-4)
    assert found.prompts == 11


def test_raw_agreement_counts_pairs_of_annotators():
    found = agreement([["a", "a", "b"], ["c", "c"], ["d"]], EXACT)
    assert (found.prompts, found.pairs, found.agreement) == (2, 4, 0.5)


def test_alpha_is_one_when_all_agree_and_undefined_when_there_is_one_answer_only():
    assert agreement([["a", "a"], ["b", "b"]], EXACT).alpha == 1.0
    assert agreement([["a", "a"], ["a", "a"]], EXACT).alpha is None
    assert agreement([["a"], ["b"]], EXACT) is None


def test_equal_answers_in_another_spelling_agree():
    assert len(set(classes(["1+2", "2+1", "2 + 1"], EXPRESSION))) == 1
    assert (
        resolve(["1+2", "3", "2+1"], classes(["1+2", "3", "2+1"], EXPRESSION), "majority") == "1+2"
    )


@pytest.mark.parametrize(
    ("labels", "majority", "first", "unanimous"),
    [
        ("aab", "a", "a", None),
        ("ab", None, "a", None),
        ("aa", "a", "a", "a"),
        ("bacca", None, "b", None),
    ],
)
def test_the_rules(labels, majority, first, unanimous):
    found = [
        resolve(list(labels), list(labels), rule) for rule in ("majority", "first", "unanimous")
    ]
    assert found == [majority, first, unanimous]


@given(answers, st.randoms())
def test_the_majority_does_not_depend_on_the_order_of_the_annotators(labels, random):
    shuffled = random.sample(labels, len(labels))
    assert resolve(labels, labels, "majority") == resolve(shuffled, shuffled, "majority")


@given(st.lists(answers, min_size=1, max_size=8))
def test_agreement_lies_between_nothing_and_all(units):
    found = agreement(units, EXACT)
    if found is not None:
        assert 0 <= found.agreement <= 1
        assert found.alpha is None or found.alpha <= 1
        assert (found.agreement == 1) == all(len(set(u)) == 1 for u in units if len(u) > 1)
