"""Answers that are compared as text: exact text and arithmetic expressions, and where they stand.

Contract: see `answers.AnswerKind`. Nothing is ever evaluated by running it, and nothing waits on
a clock. Two answers are equal if and only if their canonical forms are.
"""

import ast
import re
import threading
from functools import lru_cache

_ANSWER_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
_BRACE = re.compile(r"\\boxed\s*\{|[{}]")
_ANSWER_WORD = re.compile(r"answer\s*:", re.IGNORECASE)
_LONGEST = 400
"""Longer answers are unparseable: no answer that can be voted on is longer."""
_PARSING = threading.Lock()
"""ast.parse counts its depth for all threads together: in two at once it fails now and then, with
a SystemError."""


def after_answer_word(text: str) -> str | None:
    """The first non-empty line after the last 'Answer:', if there is one."""
    marks = list(_ANSWER_WORD.finditer(text))
    if not marks:
        return None
    lines = [line.strip() for line in text[marks[-1].end() :].splitlines()]
    return next((line for line in lines if line), None)


def last_boxed(text: str) -> str | None:
    """The content of the last \\boxed{...} that is closed, braces balanced."""
    opened: list[tuple[int, bool]] = []
    last: tuple[int, int] | None = None
    for mark in _BRACE.finditer(text):
        if mark[0] != "}":
            opened.append((mark.end(), mark[0] != "{"))
        elif opened:
            start, box = opened.pop()
            if box and (last is None or start > last[0]):
                last = start, mark.start()
    return None if last is None else text[slice(*last)]


def tagged(text: str) -> str | None:
    """The content of the last <answer> tag that is closed."""
    start, found = None, None
    for mark in _ANSWER_TAG.finditer(text):
        if mark[1] == "":
            start = mark.end()
        elif start is not None:
            found, start = text[start : mark.start()], None
    return found


class ExactAnswers:
    """Text that must agree letter by letter, white space apart.

    Read from the last <answer> tag, else the last \\boxed{}, else the line after the last
    'Answer:', else the last line.
    """

    canonical_decides = True

    def extract(self, text: str) -> str | None:
        for found in (tagged(text), last_boxed(text), after_answer_word(text)):
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

    canonical_decides = True

    def extract(self, text: str) -> str | None:
        found = tagged(text)
        if found is None:
            found = after_answer_word(text)
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
        with _PARSING:
            tree = ast.parse(text, mode="eval")
        return _write(_terms(tree.body))
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
