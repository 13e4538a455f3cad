"""The three built-in answer kinds: exact text, arithmetic expressions, mathematics.

Contract: see `answers.AnswerKind`. Nothing is ever evaluated by running it, and nothing waits on
a clock: what could take unbounded time is refused by its shape, so that a vote is the same on a
slow machine and in any thread.
"""

import ast
import logging
import re
from functools import lru_cache
from typing import Any

_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_ANSWER_WORD = re.compile(r"answer\s*:", re.IGNORECASE)
_LONGEST = 400
"""Longer answers are unparseable: no answer that can be voted on is longer."""


def _after_answer_word(text: str) -> str | None:
    """The first non-empty line after the last 'Answer:', if there is one."""
    marks = list(_ANSWER_WORD.finditer(text))
    if not marks:
        return None
    lines = [line.strip() for line in text[marks[-1].end() :].splitlines()]
    return next((line for line in lines if line), None)


def _last_boxed(text: str) -> str | None:
    """The content of the last closed \\boxed{...}, braces balanced."""
    for start in reversed([m.end() for m in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for i in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[start:i]
    return None


def _tagged(text: str) -> str | None:
    tags = _ANSWER_TAG.findall(text)
    return str(tags[-1]) if tags else None


class ExactAnswers:
    """Text that must agree letter by letter, white space apart.

    Read from the last <answer> tag, else the last \\boxed{}, else the line after the last
    'Answer:', else the last line.
    """

    def extract(self, text: str) -> str | None:
        for found in (_tagged(text), _last_boxed(text), _after_answer_word(text)):
            if found is not None:
                return self.canonical(found)
        lines = [line for line in text.splitlines() if line.strip()]
        return self.canonical(lines[-1]) if lines else None

    def equal(self, a: str, b: str) -> bool:
        left = self.canonical(a)
        return left is not None and left == self.canonical(b)

    def canonical(self, label: str) -> str | None:
        return " ".join(label.split()) or None


class ExpressionAnswers:
    """Arithmetic over integers with + - * / and brackets, equal up to the order of terms and
    factors: 2*(3+4)-1 equals (4+3)*2-1, but 2+3 does not equal 5.

    Read from the last <answer> tag, else the line after the last 'Answer:'. A trailing
    '= 24' is allowed and ignored.
    """

    def extract(self, text: str) -> str | None:
        found = _tagged(text)
        if found is None:
            found = _after_answer_word(text)
        return None if found is None else self.canonical(found)

    def equal(self, a: str, b: str) -> bool:
        left = self.canonical(a)
        return left is not None and left == self.canonical(b)

    def canonical(self, label: str) -> str | None:
        return _canonical_expression(label)


@lru_cache(maxsize=65536)
def _canonical_expression(label: str) -> str | None:
    text = label.strip().strip("$").translate(str.maketrans("×÷−·", "*/-*"))
    text = " ".join(text.split("=")[0].split())
    if not text or len(text) > _LONGEST or re.fullmatch(r"[0-9+\-*/() ]+", text) is None:
        return None
    try:
        return _write(_terms(ast.parse(text, mode="eval").body))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _write(terms: list[tuple[int, str]]) -> str:
    """Signed terms -> text, positive terms first, each kind sorted."""
    ordered = sorted(terms, key=lambda term: (-term[0], len(term[1]), term[1]))
    text = "".join(("+" if sign > 0 else "-") + term for sign, term in ordered)
    return text.removeprefix("+")


def _terms(node: ast.AST) -> list[tuple[int, str]]:
    """A sum as its signed terms; anything else is one term."""
    match node:
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _terms(left) + _terms(right)
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _terms(left) + [(-sign, term) for sign, term in _terms(right)]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return [(-sign, term) for sign, term in _terms(operand)]
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _terms(operand)
    sign, above, below = _factors(node)
    text = "*".join(sorted(above, key=lambda f: (len(f), f))) or "1"
    for factor in sorted(below, key=lambda f: (len(f), f)):
        text += "/" + factor
    return [(sign, text)]


def _factors(node: ast.AST) -> tuple[int, list[str], list[str]]:
    """A product as (sign, factors above the line, factors below it)."""
    match node:
        case ast.Constant(value=int(value)):
            return 1, [str(value)], []
        case ast.BinOp(left=left, op=ast.Mult() | ast.Div() as op, right=right):
            sign_l, above_l, below_l = _factors(left)
            sign_r, above_r, below_r = _factors(right)
            if isinstance(op, ast.Div):
                above_r, below_r = below_r, above_r
            return sign_l * sign_r, above_l + above_r, below_l + below_r
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            sign, above, below = _factors(operand)
            return -sign, above, below
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _factors(operand)
        case ast.BinOp(op=ast.Add() | ast.Sub()):
            return 1, ["(" + _write(_terms(node)) + ")"], []
    raise ValueError("not an arithmetic expression over integers")


class MathAnswers:
    """Mathematics as math-verify reads it: numbers, fractions, sets, intervals, equations.

    Its timeouts are off, because they rest on signals and fail outside the main thread. In their
    place, what could run for long is unparseable: towers of powers, large exponents and
    factorials, unevaluated integrals, sums, products and limits.
    """

    def extract(self, text: str) -> str | None:
        found = _parse(text)
        # Parsed once more on its own: the answer is compared without the text around it.
        return None if found is None else self.canonical(str(found[-1]))

    def equal(self, a: str, b: str) -> bool:
        return _math_equal(a, b)

    def canonical(self, label: str) -> str | None:
        found = _parse_answer(label.strip())
        return None if found is None else str(found[-1]).strip() or None


@lru_cache(maxsize=65536)
def _math_equal(a: str, b: str) -> bool:
    left, right = _parse_answer(a), _parse_answer(b)
    if left is None or right is None:
        return False
    return bool(_math_verify().verify(left, right, timeout_seconds=None))


@lru_cache(maxsize=65536)
def _parse_answer(answer: str) -> list[Any] | None:
    # math-verify reads no per cent sign inside a box; as it does outside, 50% is taken as 50.
    answer = answer.strip().removesuffix("%").removesuffix("\\").rstrip()
    if not answer or len(answer) > _LONGEST:
        return None
    if "\\boxed" in answer or "$" in answer:
        return _parse(answer)
    return _parse("\\boxed{" + answer + "}")


def _parse(text: str) -> list[Any] | None:
    """[expression, text of it], or None where there is no expression or one too costly."""
    found: list[Any] = _math_verify().parse(text, parsing_timeout=None)
    if len(found) < 2 or isinstance(found[0], str) or len(str(found[-1])) > _LONGEST:
        return None
    return None if _costly(found[0]) else found


def _costly(expression: Any) -> bool:
    import sympy

    unbounded = (sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit)
    for node in sympy.preorder_traversal(expression):
        if isinstance(node, unbounded):
            return True
        if isinstance(node, sympy.Pow):
            power = node.exp
            if power.has(sympy.Pow) and not power.free_symbols and not _is_root(power):
                return True
            if power.is_Number and abs(power) > 1000:
                return True
        if isinstance(node, sympy.factorial) and not (
            node.args[0].is_Symbol or (node.args[0].is_Integer and abs(node.args[0]) <= 1000)
        ):
            return True
    return False


def _is_root(power: Any) -> bool:
    """1/n as the parser writes it, Pow(n, -1): a plain root, not a tower."""
    import sympy

    return all(p.exp == -1 for p in power.atoms(sympy.Pow))


@lru_cache(maxsize=1)
def _math_verify() -> Any:
    """math-verify, imported on first use: it pulls in sympy, which takes half a second."""
    import math_verify

    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).addFilter(lambda r: "Timeout is disabled" not in r.getMessage())
    return math_verify
