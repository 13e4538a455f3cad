"""Extraction, equality, clusters and votes."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pivottrace_verl.answers import agreement, cluster, correct, get_answers, majority
from pivottrace_verl.errors import PivotTraceError

quick = settings(deadline=None, max_examples=80)
EXPRESSION = get_answers("expression")
EXACT = get_answers("exact")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("think... <answer> 2*(3+4) </answer> bye", "2*(3+4)"),
        ("<answer>1+2</answer> no: <answer>3*4</answer>", "3*4"),
        ("Answer: 1+2\nstill thinking\nAnswer:\n 9-4 \nend", "9-4"),
        ("so Answer: 3×4÷2 = 6", "3*4/2"),
        ("Answer: 5 + ", None),
        ("no mark 1+2", None),
        ("Answer: __import__('os')", None),
        ("Answer: 2**9**9**9", None),
        ("Answer: 1.5+2", None),
        ("Answer: x+2", None),
        ("<answer></answer>", None),
        ("Answer: " + "(" * 300 + "1" + ")" * 300, None),
        ("Answer: " + "1+" * 5000 + "1", None),
    ],
)
def test_an_expression_is_read_from_the_last_mark_or_is_unparseable(text, answer):
    assert EXPRESSION.extract(text) == (answer and EXPRESSION.canonical(answer))


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("2*(3+4)-1", "(4+3)*2-1", True),
        ("1+2+3", "3+(2+1)", True),
        ("8-(3-2)", "8+2-3", True),
        ("8-(3-2)", "8-3-2", False),
        ("8/(4/2)", "8*2/4", True),
        ("8/4/2", "8/(4*2)", True),
        ("8/4", "4/8", False),
        ("8-4", "4-8", False),
        ("-2*3", "2*-3", True),
        ("-2*-3", "2*3", True),
        ("2+3", "5", False),
        ("2*3", "2+3", False),
        ("2*(3+4)", "2*3+4", False),
        ("2*3+2*4", "2*(3+4)", False),
        ("12", "1*2", False),
    ],
)
def test_expressions_are_equal_up_to_order_and_grouping_only(a, b, same):
    assert EXPRESSION.equal(a, b) is same
    assert EXPRESSION.equal(b, a) is same


expressions = st.recursive(
    st.integers(0, 30).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(
        lambda t: f"({t[0]}{t[1]}{t[2]})"
    ),
    max_leaves=6,
)


@quick
@given(expressions)
def test_a_canonical_expression_is_its_own_canonical_form_and_has_the_same_value(text):
    once = EXPRESSION.canonical(text)
    assert once is not None
    assert EXPRESSION.canonical(once) == once
    from fractions import Fraction

    def value(source):
        import re

        try:
            return eval(re.sub(r"(\d+)", r"Fraction(\1)", source), {"Fraction": Fraction})  # noqa: S307
        except ZeroDivisionError:
            return None

    # Regrouping a/(b/c) moves zero divisors about; where both have a value, it is the same.
    if value(text) is not None and value(once) is not None:
        assert value(text) == value(once)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{ Zoey is  a knight }.", "Zoey is a knight"),
        (r"\boxed{\frac{1}{2}} and \boxed{open", r"\frac{1}{2}"),
        ("Answer: yes\n", "yes"),
        ("one\n\n  two  words \n", "two words"),
        ("<answer>a\nb</answer>", "a b"),
        ("", None),
        (" \n ", None),
    ],
)
def test_an_exact_answer_is_the_marked_text_or_the_last_line_in_single_spaces(text, answer):
    assert EXACT.extract(text) == answer


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("0.5", r"\frac{1}{2}", True),
        ("1,000", "1000", True),
        (r"\frac{x+1}{2}", r"\frac{1+x}{2}", True),
        (r"50\%", "50", True),
        ("(1,2)", "(2,1)", False),
        ("3", "4", False),
    ],
)
def test_mathematics_is_compared_by_meaning(a, b, same):
    assert get_answers("math").equal(a, b) is same


def test_mathematics_is_read_from_a_box_or_the_last_number():
    math = get_answers("math")
    assert math.extract(r"hence \boxed{\frac{3}{4}}.") == r"\frac{3}{4}"
    assert math.extract("The answer is 42.") == "42"
    assert math.extract("I do not know") is None


@pytest.mark.parametrize(
    "answer",
    [r"9^{9^{9^{9}}}", r"2^{2^{30}}", "1000000!", r"\sum_{n=1}^{100000000} \frac{1}{n^2}", ""],
)
def test_an_answer_that_would_take_for_ever_is_unparseable(answer):
    math = get_answers("math")
    assert math.extract("\\boxed{" + answer + "}") is None
    assert math.canonical(answer) is None
    assert math.equal(answer, "3") is False


@pytest.mark.parametrize(
    "answer", ["5!", "n!", "2^{1/3}", r"e^{2\pi i/3}", r"\sqrt[3]{5}", "x^{10}"]
)
def test_ordinary_powers_and_factorials_are_read(answer):
    assert get_answers("math").extract("\\boxed{" + answer + "}") == answer


def test_mathematics_works_outside_the_main_thread():
    found = []
    math = get_answers("math")
    worker = threading.Thread(
        target=lambda: found.append((math.extract(r"\boxed{7/2}"), math.equal("3.25", "13/4")))
    )
    worker.start()
    worker.join()
    assert found == [(r"\frac{7}{2}", True)]


answers = st.lists(st.sampled_from(["1+2", "2+1", "3", "2*3", "3*2", "6", None]), max_size=10)


@quick
@given(answers, st.randoms(use_true_random=False))
def test_a_vote_does_not_depend_on_the_order_of_the_rollouts(group, rng):
    shuffled = list(group)
    rng.shuffle(shuffled)
    here, there = cluster(group, "expression"), cluster(shuffled, "expression")
    assert here.clusters == there.clusters
    assert here.unparseable == there.unparseable == group.count(None)
    assert majority(here) == majority(there)
    assert sorted(zip(map(str, group), here.labels, strict=True)) == sorted(
        zip(map(str, shuffled), there.labels, strict=True)
    )


class Close:
    """Equal within 1, seen from one side only: neither transitive nor symmetric."""

    def __init__(self, sign=1):
        self.sign = sign

    def extract(self, text):
        return text

    def equal(self, a, b):
        return 0 <= self.sign * (int(b) - int(a)) <= 1

    def canonical(self, label):
        return label


@quick
@given(st.permutations(["3", "1", "2", "9"]), st.sampled_from([1, -1]))
def test_clusters_are_classes_even_if_equality_is_not_transitive_or_symmetric(group, sign):
    found = cluster(group, Close(sign))
    assert found.clusters == [("1", 3), ("9", 1)]


def test_clusters_are_ordered_by_count_and_labels_point_at_them():
    found = cluster(["b", None, "a", "b", "c"], "exact")
    assert found.clusters == [("b", 2), ("a", 1), ("c", 1)]
    assert found.labels == [0, -1, 1, 0, 2]
    assert found.unparseable == 1


def test_the_representative_is_the_shortest_then_the_first_spelling():
    assert cluster(["(4+3)*2", "2*(4+3)", "2*(3+4)"], "expression").clusters == [("(4+3)*2", 3)]


def test_a_tie_for_the_top_has_no_majority():
    assert majority(cluster(["a", "a", "b", "b", "c"], "exact")) is None


def test_a_group_without_an_answer_has_no_majority():
    assert majority(cluster([None, None], "exact")) is None
    assert agreement(cluster([None, None], "exact")) == 0.0
    assert majority(cluster([], "exact")) is None


def test_a_quorum_and_an_agreement_over_all_rollouts_can_be_required():
    vote = cluster(["a", "a", "b", None], "exact")
    assert majority(vote) == "a"
    assert majority(vote, quorum=2) == "a"
    assert majority(vote, quorum=3) is None
    assert agreement(vote) == 0.5
    assert majority(vote, min_agreement=0.5) == "a"
    assert majority(vote, min_agreement=0.51) is None


def test_an_unparseable_answer_is_not_correct():
    assert correct(None, "a", "exact") is False
    assert correct("a ", "a", "exact") is True


def test_a_kind_can_come_by_import_path_and_a_bad_one_is_refused(monkeypatch, tmp_path):
    (tmp_path / "my_answers.py").write_text(
        "class K:\n"
        "    def extract(self, text): return text\n"
        "    def equal(self, a, b): return a == b\n"
        "    def canonical(self, label): return label\n"
        "def half(): return object()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert get_answers("my_answers:K").extract("x") == "x"
    for bad in ("nonsense", "my_answers:missing", "no_such_module:K", "my_answers:half"):
        with pytest.raises(PivotTraceError, match="answers kind"):
            get_answers(bad)
