"""Mathematical answers, as math-verify reads and compares them.

Contract: `MathAnswers` runs in the process that asks. Plain numbers and identical texts are settled
there; everything else goes to `answer_pool`, where the functions under OPERATIONS run and where
alone math-verify and sympy are imported. math-verify's own time-outs rest on signals, which give 0
or hang outside the main thread: they are off, and the pool's limits stand in their place.
"""

import logging
import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

from pivottrace_verl.answer_kinds import last_boxed
from pivottrace_verl.answer_memo import Memo, PooledAnswers
from pivottrace_verl.answer_numbers import read_number, same_number, write_number
from pivottrace_verl.answer_points import unless_apart
from pivottrace_verl.answer_pool import Answer, TimedOut
from pivottrace_verl.answer_worker import OverLimitError

LONGEST = 400
"""Longer answers are unparseable: no answer that can be voted on is longer."""


class MathAnswers(PooledAnswers):
    """Mathematics as math-verify reads it: numbers, fractions, sets, intervals, equations.

    Read from the text as math-verify reads it: the last \\boxed{}, or the last few joined by a
    comma or "and", else what follows "answer", else the last formula or number. Two answers are
    equal if math-verify says so with either of them as the reference. 50% is 50.
    """

    def __init__(self) -> None:
        self._memo = Memo("math")

    def extract_many(self, texts: Sequence[str]) -> list[Answer]:
        boxes = [_only_box(text) for text in texts]
        known: list[Answer] = [box if box and read_number(box) else None for box in boxes]
        # Of the box alone first: rollouts do not repeat, but what they box does.
        boxed = [i for i, box in enumerate(boxes) if box is not None and known[i] is None]
        alone = self._memo.ask("extract", [f"\\boxed{{{boxes[i]}}}" for i in boxed])
        for i, answer in zip(boxed, alone, strict=True):
            known[i] = answer
        found = self._ask_rest("extract", texts, known)
        return [_spelt(answer) if isinstance(answer, str) else answer for answer in found]

    def canonical_many(self, labels: Sequence[str]) -> list[Answer]:
        stripped = [_without_percent(label) for label in labels]
        numbers = [read_number(label) for label in stripped]
        written = [None if number is None else write_number(number) for number in numbers]
        found = self._ask_rest("canonical", stripped, written)
        return [_spelt(form) if isinstance(form, str) else form for form in found]

    def equal_many(self, pairs: Sequence[tuple[str, str]]) -> list[bool | TimedOut]:
        ordered = [tuple(sorted((_without_percent(a), _without_percent(b)))) for a, b in pairs]
        return self._ask_rest("equal", ordered, [_plainly_equal(a, b) for a, b in ordered])

    def _ask_rest(self, operation: str, items: Sequence[Any], known: Sequence[Any]) -> list[Any]:
        """What is known of each item, and the pool's value where that is None."""
        rest = [item for item, value in zip(items, known, strict=True) if value is None]
        values = iter(self._memo.ask(operation, rest))
        return [next(values) if value is None else value for value in known]


def _only_box(text: str) -> str | None:
    """What the text's only box holds, where math-verify would read just that if it can."""
    if text.count("boxed") != 1 or "final answer" in text.lower():
        return None
    start = text.find("\\boxed{")
    return None if start < 0 else last_boxed(text[start : start + LONGEST])


def _spelt(answer: str) -> str:
    number = read_number(_without_percent(answer))
    return answer if number is None else write_number(number)


def _plainly_equal(a: str, b: str) -> bool | None:
    """What can be said without math-verify; None if nothing can."""
    if a == b:
        return a != ""
    if not a or not b or max(len(a), len(b)) > LONGEST:
        return False
    left, right = read_number(a), read_number(b)
    return None if left is None or right is None else same_number(left, right)


def _without_percent(answer: str) -> str:
    # math-verify reads no per cent sign inside a box; as it does outside, 50% is taken as 50.
    return answer.strip().removesuffix("%").removesuffix("\\").rstrip()


# From here on: what runs in the worker.


@cache
def prepare() -> None:
    """Import math-verify and build its grammar, which no answer should have to wait for."""
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from math_verify import grader

    simplifies = getattr(grader, "sympy_symbolic_eq", None)
    if simplifies is not None:
        grader.sympy_symbolic_eq = unless_apart(simplifies)
    _equal((r"\frac{x}{2}", "x/3"))


def _extract(text: str) -> str | None:
    found = _parse(text)
    # Parsed once more on its own: the answer is compared without the text around it.
    return None if found is None else _canonical(_without_percent(str(found[-1])))


def _canonical(label: str) -> str | None:
    found = _parse_answer(label)
    return None if found is None else str(found[-1]).strip() or None


def _equal(pair: tuple[str, str]) -> bool:
    left, right = (_parse_answer(answer) for answer in pair)
    if left is None or right is None:
        return False
    for expression in (left[0], right[0]):
        _refuse_tower(expression)
    return _verify(left, right) or (not _plain(left, right) and _verify(right, left))


def _verify(gold: list[Any], target: list[Any]) -> bool:
    import math_verify

    return bool(math_verify.verify(gold, target, timeout_seconds=None))


def _plain(left: list[Any], right: list[Any]) -> bool:
    """Whether it does not matter which of them is the reference: no relation, set or matrix."""
    import sympy

    return isinstance(left[0], sympy.Expr) and isinstance(right[0], sympy.Expr)


@lru_cache(maxsize=4096)
def _parse_answer(answer: str) -> list[Any] | None:
    if not answer or len(answer) > LONGEST:
        return None
    if "\\boxed" in answer or "$" in answer.replace("\\$", ""):
        return _parse(answer)
    return _parse("\\boxed{" + answer + "}")


def _parse(text: str) -> list[Any] | None:
    """[expression, text of it], or None where there is no expression."""
    import math_verify

    found: list[Any] = math_verify.parse(text, parsing_timeout=None)
    if len(found) < 2 or isinstance(found[0], str) or len(str(found[-1])) > LONGEST:
        return None
    return found


def _refuse_tower(expression: Any) -> None:
    """Numbers that no machine can write out are given up at once, and everywhere alike."""
    import sympy

    def bits(power: Any) -> float:
        base, exponent = power.args
        if not (base.is_Number and exponent.is_Number):
            return 0.0
        return float(abs(exponent)) * math.log2(float(abs(base)) + 1)

    for node in sympy.preorder_traversal(expression):
        if isinstance(node, sympy.Pow) and not node.free_symbols:
            power = node.exp
            if power.is_Number and abs(power) > 10**6:
                raise OverLimitError
            if any(bits(inner) > 20 for inner in power.atoms(sympy.Pow)):
                raise OverLimitError
        if isinstance(node, sympy.factorial) and node.args[0].is_Number and node.args[0] > 10**5:
            raise OverLimitError


OPERATIONS = {"extract": _extract, "canonical": _canonical, "equal": _equal}
