"""What counts as the same mathematical answer: the corpus, and where math-verify is wrong."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pivottrace_verl import answer_pool
from pivottrace_verl.answer_math import OPERATIONS, MathAnswers
from pivottrace_verl.answer_numbers import read_number, same_number, write_number
from pivottrace_verl.answers import canonical_many, equal_many, extract_many

EQUAL = [
    ("1/2", "0.5"),
    (r"\frac12", "1/2"),
    (r"\frac{1}{2}", r"\dfrac{2}{4}"),
    (r"1\frac{1}{2}", "3/2"),
    ("1,000", "1000"),
    (r"1{,}000", "1000"),
    ("−5", "-5"),  # Unicode minus
    ("0.333333", "1/3"),  # rounded to six places
    (r"50\%", "50"),
    ("50%", r"50\%"),
    (r"\$5", "5"),
    (r"5 \text{ cm}", "5"),
    (r"90^\circ", "90"),
    ("2^{10}", "1024"),
    (r"1.5\times10^3", "1500"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    ("x=5", "5"),
    ("x^2-1", "(x-1)(x+1)"),
    (r"\sin^2 x+\cos^2 x", "1"),
    (r"\frac{\pi}{2}", r"0.5\pi"),
    ("y=2x+1", "2x+1=y"),
    ("x<3", "3>x"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("1,2,3", "3,2,1"),
    (r"\pm 2", "2,-2"),
    ("(0,1]", "(0,1.0]"),
    (r"[1,2)\cup(3,4)", r"(3,4)\cup[1,2)"),
    (r"1\le x\le 2", "[1,2]"),
    (r"\left(1,2\right)", "(1,2)"),
    (r"\emptyset", r"\{\}"),
    ("3+4i", "4i+3"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
    (r"\text{Yes}", r"\text{yes}"),
]
DIFFERENT = [
    ("3", "4"),
    ("-5", "5"),
    ("0.3333", "1/3"),
    ("0.999999999", "1"),
    ("3.14159", r"\pi"),
    ("3,4", "34"),
    ("(1,2)", "(2,1)"),
    ("[1,2]", "(1,2)"),
    ("x>3", "x<3"),
    ("x=1", "y=1"),
    ("(a+b)^2", "a^2+b^2"),
    (r"\sqrt{x^2}", "x"),
    ("yes", "no"),
    (r"\text{even}", r"\text{odd}"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}2&1\end{pmatrix}"),
    ("", "3"),
]
WRONGLY_EQUAL = [
    ("even", "neve"),  # letters outside \text{} are a product of variables
    (r"5\text{ m}", r"5\text{ km}"),  # units are dropped, whatever they are
    ("1.0000001", "1.0000002"),  # decimals are rounded to six places
]
WRONGLY_DIFFERENT = [
    ("1 1/2", "3/2"),  # a mixed number without LaTeX is read as its whole part
    ("1 000", "1000"),  # a space between digits multiplies
    ("1e3", "1000"),  # e is Euler's number
    (r"50\%", "0.5"),  # the sign is dropped, so that 50% is 50
    ("2,5", "2.5"),  # a comma lists, or groups thousands
]
UNPARSEABLE = ["", "I do not know.", r"\boxed{", r"\boxed{}", r"\boxed{?}", "$$", "...", "½", "-"]


@pytest.fixture(autouse=True, scope="module")
def one_worker():
    answer_pool.set_limits(answer_pool.Limits(workers=1, seconds=20))
    yield
    answer_pool.close()


def either_way(pairs):
    return [*pairs, *((b, a) for a, b in pairs)]


@pytest.mark.parametrize(
    ("pairs", "same"),
    [(EQUAL, True), (DIFFERENT, False), (WRONGLY_EQUAL, True), (WRONGLY_DIFFERENT, False)],
    ids=["equal", "different", "wrongly equal", "wrongly different"],
)
def test_pairs_are_equal_or_not_from_either_side(pairs, same):
    found = equal_many("math", either_way(pairs))
    assert [pair for pair, got in zip(either_way(pairs), found, strict=True) if got != same] == []


def test_a_text_without_an_answer_is_unparseable():
    assert extract_many("math", UNPARSEABLE) == [None] * len(UNPARSEABLE)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{\frac{\sqrt{3}}{2}}", r"\frac{\sqrt{3}}{2}"),  # nested braces
        (r"\boxed{\boxed{3}}", "3"),
        (r"first \boxed{1}. Hence it must be \boxed{x_{1}^{2}} at last", r"x_{1}^{2}"),
        (r"\boxed{-\dfrac{6}{4}}", r"-\frac{3}{2}"),
        ("The final answer is $12$. I hope it is correct.", "12"),
        ("It costs 1,250 dollars", "1250"),
        (r"\boxed{\text{yes}}", r"\text{yes}"),
        (r"\boxed{3} and \boxed{4}", "3,4"),
    ],
)
def test_an_answer_is_read_from_a_box_an_anchor_or_the_last_number(text, answer):
    assert extract_many("math", [text]) == [answer]


def test_a_canonical_form_is_equal_to_its_answer_and_its_own_canonical_form():
    answers = [a for pair in EQUAL for a in pair]
    forms = canonical_many("math", answers)
    assert None not in forms
    assert canonical_many("math", forms) == forms
    assert equal_many("math", list(zip(answers, forms, strict=True))) == [True] * len(answers)


NUMBERS = [
    *("0", "-0", "7", "007", "+5", "-5", "−5", "- 5", "1,000", "1000", "-1,000", "100,200"),
    *("1{,}000", "12,34", "0,123", "1,000,000", "0.5", ".5", "-.5", "0.50", "1/2", "2/4", "4/2"),
    *(r"\frac12", r"\frac{1}{2}", r"\dfrac{1}{2}", r"-\frac{1}{2}", r"\frac{-1}{2}", "-1/2"),
    *("1/3", "0.333333", "0.3333333", "0.33333", "2", "2.0", "1,234.5", "1234.50", "3 / 4", "1/0"),
    *("123456789012345678901234567890", "999999.9999", "0.000001", "0.0000001", r"-\frac{-1}{2}"),
]


def test_numbers_compared_without_math_verify_are_compared_as_it_compares_them():
    quick = MathAnswers()
    settled = 0
    for a, b in itertools.combinations_with_replacement(NUMBERS, 2):
        left, right = read_number(a), read_number(b)
        if left is None or right is None or same_number(left, right) is None:
            continue
        settled += 1
        assert (a, b, quick.equal(a, b)) == (a, b, OPERATIONS["equal"]((a, b)))
    assert settled > 700


numbers = st.one_of(
    st.integers(-(10**6), 10**6).map(str),
    st.decimals(-(10**4), 10**4, places=5).map(str),
    st.tuples(st.integers(-99, 99), st.integers(1, 99)).map(
        lambda t: rf"\frac{{{t[0]}}}{{{t[1]}}}"
    ),
    st.tuples(st.integers(-99, 99), st.integers(1, 99)).map(lambda t: f"{t[0]}/{t[1]}"),
)


@settings(deadline=None, max_examples=150)
@given(numbers, numbers)
def test_any_two_plain_numbers_are_compared_as_math_verify_compares_them(a, b):
    left, right = read_number(a), read_number(b)
    assert left is not None and right is not None
    for other in (b, write_number(left)):
        same = same_number(left, read_number(other))
        if same is not None:
            assert same == OPERATIONS["equal"]((a, other))


@settings(deadline=None, max_examples=200)
@given(numbers)
def test_a_written_number_reads_as_the_same_number(text):
    number = read_number(text)
    again = read_number(write_number(number))
    assert again is not None and again.value == number.value
    assert write_number(again) == write_number(number)


BOXED = [
    r"\boxed{%s}",
    r"so $\boxed{%s}$.",
    "\\[ x=\\boxed{%s} \\] done $y=3$",
    r"The answer is \boxed{%s}. Check: $4$",
    r"**Answer:** $\boxed{%s}$ or 12",
    r"\frac{1}{2} then \boxed{%s} and \frac{1}{3}",
    r"\boxed{%s} is the answer = 4.",
    "I get 5. \\boxed{%s}\n\nfinal {x} }",
    r"$3$, $\boxed{%s}$, $4$ and $5$",
    r"-\boxed{%s}",
    r"$\boxed{%s}\%%$",
    r"\boxed{%s} percent",
    r"3\boxed{%s} \text{ cm}",
    r"$$x = \boxed{%s}$$ The answer is 17.",
]


@pytest.mark.parametrize("answer", ["7", "1,000", "1/2", r"\frac{3}{4}", "-5", "0.25"])
@pytest.mark.parametrize("text", BOXED)
def test_a_boxed_number_is_read_as_math_verify_reads_it(text, answer, monkeypatch):
    asked = []
    monkeypatch.setattr(answer_pool, "ask", lambda *question: asked.append(question) or [])
    (quick,) = MathAnswers().extract_many([text % answer])
    assert asked == []
    assert read_number(quick).value == read_number(OPERATIONS["extract"](text % answer)).value


@pytest.mark.parametrize("text", BOXED)
def test_any_box_is_read_as_math_verify_reads_it(text):
    answers = [*(a for pair in EQUAL + DIFFERENT for a in pair), "?", " ", "x=1, y=2", "A"]
    texts = [text % answer for answer in answers if read_number(answer) is None]
    read = [OPERATIONS["extract"](whole) for whole in texts]
    # What turns out to be a number is spelt as such on top.
    assert extract_many("math", texts) == canonical_many("math", [answer or "" for answer in read])


def test_a_box_is_read_once_however_many_rollouts_repeat_it(monkeypatch):
    asked = []
    ask = answer_pool.ask
    monkeypatch.setattr(answer_pool, "ask", lambda *q: asked.extend(q[2]) or ask(*q))
    math = MathAnswers()
    for i in range(3):
        assert math.extract_many([rf"{i} rows, so \boxed{{x^2}}."]) == ["x^2"]
    assert asked == [r"\boxed{x^2}"]
    assert math.extract_many([r"So \boxed{?}."]) == [None]
    assert asked[1:] == [r"\boxed{?}", r"So \boxed{?}."]
