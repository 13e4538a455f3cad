"""Formulas told apart at a point are those that math-verify finds different."""

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from math_verify import grader

from pivottrace_verl.answer_math import OPERATIONS, _parse_answer, prepare
from pivottrace_verl.answer_points import apart, unless_apart

x, y = sympy.symbols("x y")
leaves = st.sampled_from([x, y, sympy.pi, *map(sympy.Integer, range(-3, 4)), sympy.Rational(1, 3)])
EXPONENTS = [sympy.Integer(2), sympy.Integer(-1), sympy.Rational(1, 2), sympy.Integer(3)]
formulas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda pair: pair[0] + pair[1]),
        st.tuples(inner, inner).map(lambda pair: pair[0] * pair[1]),
        st.tuples(inner, st.sampled_from(EXPONENTS)).map(lambda pair: pair[0] ** pair[1]),
    ),
    max_leaves=5,
)
REWRITES = [sympy.expand, sympy.factor, sympy.together, sympy.simplify, sympy.radsimp]


@settings(deadline=None, max_examples=150)
@given(formulas, st.sampled_from(REWRITES))
def test_a_formula_is_never_apart_from_another_form_of_it(formula, rewrite):
    if not formula.has(sympy.zoo, sympy.nan):
        assert not apart(formula, rewrite(formula))


@settings(deadline=None, max_examples=150)
@given(formulas, formulas)
def test_math_verify_finds_equal_nothing_that_is_apart(a, b):
    if apart(a, b):
        prepare()
        assert not sympy.simplify(a - b).is_zero


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (r"(x+1)^2", "x^2+2x+1"),
        (r"\sqrt{8x}", r"2\sqrt{2x}"),
        (r"\frac{1}{\sqrt{2}-1}x", r"(\sqrt{2}+1)x"),
        (r"\sqrt{x^2+2x+1}", "x+1"),
        (r"\sqrt{(x+1)^2-x^2-2x-1}", "0x"),
        (r"\sqrt{x-5}", r"\sqrt{x-5}"),
        (r"x^{500}", "x^{400}"),
        (r"\sin(x)", r"\cos(x)"),
    ],
)
def test_what_is_equal_or_out_of_reach_is_not_apart(a, b):
    assert not apart(_parse_answer(a)[0], _parse_answer(b)[0])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (r"6400\sqrt{x}", r"6401\sqrt{x}"),
        (r"\frac{x}{2}", r"\frac{x}{3}"),
        ("x+y", "x-y"),
        (r"2\pi r", r"\pi r^2"),
    ],
)
def test_different_formulas_are_apart_and_nothing_is_simplified(a, b, monkeypatch):
    assert apart(_parse_answer(a)[0], _parse_answer(b)[0])
    prepare()
    monkeypatch.setattr(grader, "simplify", lambda difference: pytest.fail("simplified"))
    assert OPERATIONS["equal"]((a, b)) is False


def test_all_else_is_left_to_the_comparison():
    asked = []
    equal = unless_apart(lambda a, b: asked.append((a, b)) or True)
    assert equal(sympy.Matrix([x]), sympy.Matrix([y])) and equal("a", "b") and len(asked) == 2
