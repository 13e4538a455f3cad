"""Extraction, equality, clusters and votes."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pivottrace_verl import answer_pool
from pivottrace_verl.answers import (
    TIMED_OUT,
    Grade,
    agreement,
    canonical_many,
    cluster,
    correct,
    equal_many,
    extract_many,
    get_answers,
    grade,
    grade_many,
    majority,
)
from pivottrace_verl.errors import PivotTraceError

quick = settings(deadline=None, max_examples=80)
EXPRESSION = get_answers("expression")
EXACT = get_answers("exact")


@pytest.fixture(autouse=True, scope="module")
def one_worker():
    answer_pool.set_limits(answer_pool.Limits(workers=1, seconds=1.5))
    yield
    answer_pool.close()


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
    [r"9^{9^{9^{9}}}", r"2^{2^{30}}", "1000000!", r"\binom{100000000}{50000000}"],
)
def test_an_answer_that_would_take_for_ever_is_timed_out_and_equal_to_itself_alone(answer):
    assert grade(answer, "3", "math") is Grade.TIMED_OUT
    assert grade("3", answer, "math") is Grade.TIMED_OUT
    assert correct(answer, "3", "math") is False
    assert grade(answer, answer, "math") is Grade.RIGHT


def test_the_four_grades_are_told_apart():
    answers = [r"\frac{4}{8}", "2", None, TIMED_OUT]
    assert grade_many("math", [(answer, "0.5") for answer in answers]) == [
        Grade.RIGHT,
        Grade.WRONG,
        Grade.UNPARSEABLE,
        Grade.TIMED_OUT,
    ]


@pytest.mark.parametrize(
    "answer", ["5!", "n!", "2^{2018}", "2^{1/3}", r"e^{2\pi i/3}", r"\sqrt[3]{5}", "x^{10}"]
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


answers = st.lists(
    st.sampled_from(["1+2", "2+1", "3", "2*3", "3*2", "6", None, TIMED_OUT]), max_size=10
)


@quick
@given(answers, st.randoms(use_true_random=False))
def test_a_vote_does_not_depend_on_the_order_of_the_rollouts(group, rng):
    shuffled = list(group)
    rng.shuffle(shuffled)
    here, there = cluster(group, "expression"), cluster(shuffled, "expression")
    assert here.clusters == there.clusters
    assert here.unparseable == there.unparseable == group.count(None)
    assert here.timed_out == there.timed_out == group.count(TIMED_OUT)
    assert majority(here) == majority(there)
    assert sorted(zip(map(str, group), here.labels, strict=True)) == sorted(
        zip(map(str, shuffled), there.labels, strict=True)
    )


@quick
@given(answers)
def test_a_group_repeated_has_the_same_classes_and_the_same_agreement(group):
    once, twice = cluster(group, "expression"), cluster(group + group, "expression")
    assert twice.clusters == [(answer, 2 * count) for answer, count in once.clusters]
    assert twice.labels == once.labels * 2
    assert agreement(twice) == agreement(once)
    assert majority(twice) == majority(once)


@quick
@given(answers)
def test_another_spelling_of_an_answer_changes_no_class(group):
    spelt = [f"({a})" if isinstance(a, str) else a for a in group]
    here, there = cluster(group, "expression"), cluster(spelt, "expression")
    same = [[x == y for x in vote.labels for y in vote.labels] for vote in (here, there)]
    assert same[0] == same[1]


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


class Slow(Close):
    """Equal texts are equal; a comparison with "slow" times out, as does "a" with "b"."""

    symmetric = True

    def extract_many(self, texts):
        return list(texts)

    def canonical_many(self, labels):
        return list(labels)

    def equal_many(self, pairs):
        open_ = ({"a", "b"},)
        return [
            TIMED_OUT if {"slow", "slower"} & set(pair) or set(pair) in open_ else False
            for pair in pairs
        ]


def test_one_rollout_that_nothing_can_be_compared_with_costs_the_group_that_rollout_alone():
    vote = cluster(["c", "slow", "c", "d", None, "e"], Slow())
    assert vote.clusters == [("c", 2), ("d", 1), ("e", 1)]
    assert vote.labels == [0, -2, 0, 1, -1, 2]
    assert (vote.unparseable, vote.timed_out) == (1, 1)
    assert majority(vote) == "c"
    assert agreement(vote) == 2 / 6


def test_of_two_classes_that_could_not_be_compared_the_smaller_is_set_apart_or_both():
    assert cluster(["a", "b", "a"], Slow()).clusters == [("a", 2)]
    assert cluster(["a", "b", "b", "c"], Slow()).clusters == [("b", 2), ("c", 1)]
    even = cluster(["a", "b", "a", "b", "c"], Slow())
    assert (even.clusters, even.timed_out) == ([("c", 1)], 4)


def test_a_number_that_nobody_can_write_out_has_no_vote_in_a_real_group():
    tower = r"9^{9^{9^{9}}}"
    vote = cluster(["3", tower, r"\sqrt{9}", "4", tower], "math")
    assert vote.clusters == [("3", 2), ("4", 1)]
    assert vote.labels == [0, -2, 0, 1, -2]


@quick
@given(
    st.lists(st.sampled_from(["a", "b", "c", "slow", "slower", None]), max_size=9),
    st.randoms(use_true_random=False),
)
def test_what_is_set_apart_does_not_depend_on_the_order_of_the_rollouts(group, rng):
    shuffled = list(group)
    rng.shuffle(shuffled)
    here, there = cluster(group, Slow()), cluster(shuffled, Slow())
    assert (here.clusters, here.timed_out) == (there.clusters, there.timed_out)


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


def test_an_error_in_a_users_verifier_is_a_sentence_naming_it_and_the_answer(monkeypatch, tmp_path):
    (tmp_path / "broken_answers.py").write_text(
        "class K:\n"
        "    def extract(self, text): return 7\n"
        "    def equal(self, a, b): return {}[a]\n"
        "    def canonical(self, label): return label\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    kind = get_answers("broken_answers:K")
    with pytest.raises(
        PivotTraceError, match=r"broken_answers:K failed in equal\('x', 'y'\): KeyE"
    ):
        correct("x", "y", kind)
    with pytest.raises(PivotTraceError, match=r"broken_answers:K gave a int in extract"):
        kind.extract("text")


@pytest.mark.parametrize("kind", ["math", "exact", "expression"])
def test_many_at_a_time_are_the_same_as_one_at_a_time(kind):
    made = get_answers(kind)
    texts = [
        "Answer: 1+2",
        r"so \boxed{x^2}",
        "",
        "nothing",
        r"\boxed{0.5}",
        "<answer>3*4</answer>",
    ]
    assert extract_many(kind, texts) == [made.extract(text) for text in texts]
    labels = ["1+2", "1/2", "", "x+1", "two words", "7"]
    assert canonical_many(kind, labels) == [made.canonical(label) for label in labels]
    pairs = [(a, b) for a in labels for b in labels]
    assert equal_many(kind, pairs) == [made.equal(a, b) for a, b in pairs]


@pytest.mark.parametrize(
    "text", ["\\boxed{" * 14000, "<answer>" * 12000, "answer" + " " * 100000, "{" * 100000]
)
def test_the_places_of_an_answer_are_found_in_one_pass(text):
    start = time.monotonic()
    for kind in (EXACT, EXPRESSION):
        kind.extract(text)
    # Reading from every place anew would take minutes.
    assert time.monotonic() - start < 30.0
