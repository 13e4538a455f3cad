"""Answers to reasoning-gym's tasks, scored by the tasks' own `score_answer`.

Contract: a pool keeps no entry of the generator, only the prompt and, once bought, a label; so a
scorer is given the entry {"answer": label}, and two answers are the same if it gives one of them
full marks with the other as the label. That is all the scorer needs for chain_sum, gsm_symbolic,
knights_knaves and every task scored by exact text. countdown's scorer wants the numbers and the
target, which a right answer holds itself: those of the label are taken. Other tasks read more of
the entry, some of them by evaluating the text, and are refused. Partial marks count as wrong.
"""

import contextlib
import importlib
import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from functools import cache
from typing import Any

from pivottrace_verl.answer_kinds import ExpressionAnswers, after_answer_word, last_boxed, tagged
from pivottrace_verl.answer_math import LONGEST
from pivottrace_verl.answer_memo import Memo, PooledAnswers
from pivottrace_verl.answer_pool import Answer, TimedOut, ask
from pivottrace_verl.errors import PivotTraceError


class ReasoningGymAnswers(PooledAnswers):
    """The answers of one reasoning-gym task.

    Read from the last <answer> tag, else the last \\boxed{}, else the line after the last
    'Answer:'. Needs the package reasoning-gym; PivotTraceError if the task is none of its tasks,
    or one that cannot be scored without the generator's entry.
    """

    def __init__(self, task: str) -> None:
        self._task = task
        self._memo = Memo("reasoning_gym")
        reason = ask("reasoning_gym", "refuse", [task])[0]
        if reason is not None:
            raise PivotTraceError(f"The answers kind 'reasoning_gym:{task}' cannot be: {reason}.")

    def extract_many(self, texts: Sequence[str]) -> list[Answer]:
        found = [_marked(text) for text in texts]
        read = iter(self.canonical_many([answer for answer in found if answer is not None]))
        return [None if answer is None else next(read) for answer in found]

    def canonical_many(self, labels: Sequence[str]) -> list[Answer]:
        return self._memo.ask("canonical", [(self._task, label) for label in labels])

    def equal_many(self, pairs: Sequence[tuple[str, str]]) -> list[bool | TimedOut]:
        return self._memo.ask("equal", [(self._task, *sorted(pair)) for pair in pairs])


def _marked(text: str) -> str | None:
    for found in (tagged(text), last_boxed(text), after_answer_word(text)):
        if found is not None:
            return found
    return None


# From here on: what runs in the worker.


def prepare() -> None:
    """Import reasoning-gym, which no answer should have to wait for; `_refuse` says if it is not
    there."""
    with contextlib.suppress(ImportError):
        importlib.import_module("reasoning_gym")


def _decimal(answer: str, dataset: Any) -> str | None:
    try:
        value = Decimal(answer.replace(",", ""))
    except InvalidOperation:
        return None
    return f"{value.normalize():f}" if value.is_finite() else None


def _first_number(answer: str, dataset: Any) -> str | None:
    # As the scorer reads it, which takes no minus sign at the start of the text.
    found = re.search(r"\b-?\d+(?:\.\d+)?\b", answer)
    return None if found is None else found[0]


def _arithmetic(answer: str, dataset: Any) -> str | None:
    # The scorer hands the text to sympy's parse_expr, which evaluates it as Python: nothing but
    # integers, + - * / and brackets gets there, whatever else sympy could read.
    form = None if "=" in answer else ExpressionAnswers().canonical(answer)
    return None if form is None or _target(form) is None else form


def _roles(answer: str, dataset: Any) -> str | None:
    pairs = dataset._normalize_answer(answer)
    return ", ".join(f"{name} is a {role}" for name, role in sorted(pairs)) or None


def _text(answer: str, dataset: Any) -> str | None:
    return answer


READERS: dict[str, Callable[[str, Any], str | None]] = {
    "chain_sum": _decimal,
    "gsm_symbolic": _first_number,
    "countdown": _arithmetic,
    "knights_knaves": _roles,
}


def _refuse(task: str) -> str | None:
    """Why a task's answers cannot be compared; None if they can."""
    try:
        from reasoning_gym.dataset import ProceduralDataset
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        return f"the package reasoning-gym is not installed ({error})"
    if task not in DATASETS:
        return "reasoning-gym has no such task"
    exact = DATASETS[task][0].score_answer is ProceduralDataset.score_answer
    if task in READERS or exact:
        return None
    return (
        "its scorer reads more of the generator's entry than the answer, which a pool does not "
        "keep; give a verifier of your own as 'pkg.module:factory'"
    )


def _canonical(item: tuple[str, str]) -> str | None:
    task, answer = item
    answer = " ".join(answer.split())
    if not answer or len(answer) > LONGEST:
        return None
    return READERS.get(task, _text)(answer, _dataset(task))


def _equal(item: tuple[str, str, str]) -> bool:
    task = item[0]
    a, b = (_canonical((task, answer)) for answer in item[1:])
    if a is None or b is None:
        return False
    return a == b or _scores(task, a, b) or _scores(task, b, a)


def _scores(task: str, answer: str, label: str) -> bool:
    entry = {"answer": label, "metadata": _metadata(task, label)}
    return float(_dataset(task).score_answer(answer, entry)) >= 1.0


def _metadata(task: str, label: str) -> dict[str, Any]:
    if task != "countdown":
        return {}
    return {"numbers": [int(n) for n in re.findall(r"\d+", label)], "target": _target(label)}


def _target(expression: str) -> float | None:
    """The value of an expression of digits, + - * / and brackets; None if it has none."""
    from sympy.parsing.sympy_parser import parse_expr

    try:
        return float(parse_expr(expression))
    except TypeError:  # a division by zero
        return None


@cache
def _dataset(task: str) -> Any:
    from reasoning_gym.factory import create_dataset

    return create_dataset(task)


OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "refuse": _refuse,
    "canonical": _canonical,
    "equal": _equal,
}
