"""Countdown with three numbers: instances, prompts, and worked solutions that search and fail.

Contract: instances come from reasoning-gym's `countdown` and are kept only if they have exactly
one solution up to commutativity and associativity, so that a vote over answers means something.
Two instances are the same if their sorted numbers and target are; no held-out problem is used to
train a policy.

A worked solution is a depth-first search written out: combine two numbers, combine the result
with the third, compare with the target, say `yes` or `no`, go `back`. The order of the search is
an imperfect intuition, and the demonstrator is careless on purpose (`Carelessness`): it
miscalculates, overlooks a solution, claims one that is none, miscopies it, or gives up and
guesses. A policy trained on this can do better than it does, which leaves reinforcement learning
something to sharpen, and it fails more often the longer it searches.

Axes: none; one instance, one text at a time.
"""

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import cache
from itertools import permutations

import reasoning_gym

from pivottrace_verl.answers import get_answers

ANSWERS = "expression"
"""The kind of `pivottrace_verl.answers` that reads and compares this task's answers."""

MAX_VALUE = 14
"""Largest number a problem gives."""

MAX_NUMBER = 199
"""Largest number a worked solution may mention; numbers 0..MAX_NUMBER are single tokens."""

QUESTION = "Calculate {target} using all of these numbers: {numbers}."
"""The shortest of reasoning-gym's three phrasings, used for all problems: telling where the target
stands is no part of the exercise, and costs a small model much of its training."""

ANSWER_FORMAT = "Answer in <answer> </answer>."
"""Said in place of reasoning-gym's longer format instructions and of its second sentence: every
rollout of every step pays for the prompt again."""

HELD_OUT = 30
"""Percentage of all problems, chosen by a hash of the problem, that no policy is trained on."""

Expr = int | tuple[str, "Expr", "Expr"]
"""An arithmetic expression: an integer or (operator, left, right)."""


@dataclass(frozen=True)
class Instance:
    """One problem: the numbers in the order shown, and the target."""

    numbers: tuple[int, ...]
    target: int

    @property
    def key(self) -> tuple[tuple[int, ...], int]:
        """What makes two instances the same problem."""
        return tuple(sorted(self.numbers)), self.target

    @property
    def prompt(self) -> str:
        """The user's message."""
        numbers = ", ".join(map(str, self.numbers))
        question = QUESTION.format(target=self.target, numbers=numbers)
        return f"{question} {ANSWER_FORMAT}"


@dataclass(frozen=True)
class Carelessness:
    """How the demonstrator goes wrong; each field is a probability unless it says otherwise."""

    insight: float = 0.3
    """A new branch is one that leads to the solution, whatever the intuition says."""
    temperature: float = 0.35
    """Spread of the intuition "get close to the target first" (in log distance)."""
    hasty: float = 0.4
    """It does not search at all and guesses."""
    miscalculate: float = 0.02
    """A result is off by a little, and the search goes on with it."""
    overlook: float = 0.03
    """A combination that hits the target is waved through as `no`."""
    wishful: float = 0.01
    """A first failing combination is claimed to hit the target."""
    impatience: float = 0.02
    """Added to `wishful` for every combination that has failed already."""
    miscopy: float = 0.03
    """The answer is not the expression that was found."""
    give_up: float = 0.03
    """After a failure the demonstrator stops searching and guesses."""
    patience: int = 5
    """Failures (a count) after which it gives up in any case."""


def careful(c: Carelessness) -> Carelessness:
    """The same search without the mistakes."""
    zero = {f.name: 0.0 for f in fields(c) if f.name not in ("insight", "temperature", "patience")}
    return Carelessness(insight=c.insight, temperature=c.temperature, patience=c.patience, **zero)


@dataclass(frozen=True)
class Step:
    """`left op right = value`."""

    left: int
    op: str
    right: int
    value: int

    def __str__(self) -> str:
        return f"{self.left} {self.op} {self.right} = {self.value}"


@dataclass(frozen=True)
class Branch:
    """A first step, the number it leaves, and the second steps that could follow."""

    first: Step
    rest: int
    seconds: tuple[Step, ...]


@cache
def solutions(numbers: tuple[int, ...]) -> dict[int, set[str]]:
    """Every integer reachable from exactly these numbers -> its solutions in canonical form.

    All groupings and all intermediate values count, negative and fractional ones too.
    """
    table: dict[int, set[str]] = {}
    for value, expr in _combine([(Fraction(n), n) for n in numbers]):
        if value.denominator == 1:
            form = get_answers(ANSWERS).canonical(_text(expr))
            if form is not None:
                table.setdefault(int(value), set()).add(form)
    return table


def _combine(items: list[tuple[Fraction, Expr]]) -> Iterator[tuple[Fraction, Expr]]:
    if len(items) == 1:
        yield items[0]
        return
    for i, j in permutations(range(len(items)), 2):
        (a, ea), (b, eb) = items[i], items[j]
        rest = [item for k, item in enumerate(items) if k not in (i, j)]
        for op in "+-*/":
            if (op in "+*" and i > j) or (op == "/" and b == 0):
                continue
            value = a + b if op == "+" else a - b if op == "-" else a * b if op == "*" else a / b
            yield from _combine([*rest, (value, (op, ea, eb))])


def steps(a: int, b: int) -> tuple[Step, ...]:
    """The combinations of two numbers that a search writes down: positive integers only, no
    multiplication or division by one; sums and products keep the order given."""
    x, y = max(a, b), min(a, b)
    found = [Step(a, "+", b, a + b)]
    if x > y:
        found.append(Step(x, "-", y, x - y))
    if y > 1:
        found.append(Step(a, "*", b, a * b))
        if x % y == 0:
            found.append(Step(x, "/", y, x // y))
    return tuple(s for s in found if s.value <= MAX_NUMBER)


def branches(numbers: tuple[int, ...]) -> tuple[Branch, ...]:
    """Every way to begin with three numbers."""
    a, b, c = numbers
    pairs = [(a, b, c), (a, c, b), (b, c, a)]
    return tuple(
        Branch(first, rest, steps(first.value, rest))
        for x, y, rest in pairs
        for first in steps(x, y)
    )


def solvable(instance: Instance) -> bool:
    """One solution up to canonical form, and the search can reach it."""
    found = solutions(tuple(sorted(instance.numbers))).get(instance.target, set())
    return len(found) == 1 and any(
        s.value == instance.target for b in branches(instance.numbers) for s in b.seconds
    )


def label(instance: Instance) -> str:
    """The one solution in canonical form."""
    (form,) = solutions(tuple(sorted(instance.numbers)))[instance.target]
    return form


def _text(expr: Expr) -> str:
    if isinstance(expr, int):
        return str(expr)
    left, right = (e if isinstance(e, int) else f"( {_text(e)} )" for e in expr[1:])
    return f"{left} {expr[0]} {right}"


def held_out(instance: Instance) -> bool:
    """Whether the problem belongs to pool or validation rather than to the policy's training."""
    digest = hashlib.sha256(repr(instance.key).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT


def draw(n: int, seed: int, *, for_training: bool, tries: int | None = None) -> list[Instance]:
    """`n` distinct instances, all held out or none of them.

    Raises:
        ValueError: reasoning-gym did not yield enough within `tries` (default: 40 n + 2000).
    """
    size = 40 * n + 2000 if tries is None else tries
    taken = set()
    data = reasoning_gym.create_dataset(
        "countdown",
        min_numbers=3,
        max_numbers=3,
        min_value=1,
        max_value=MAX_VALUE,
        min_target=5,
        max_target=99,
        size=size,
        seed=1_000_003 * seed,  # neighbouring seeds would share all rows but one
    )
    found: list[Instance] = []
    for i in range(size):
        if len(found) == n:
            return found
        row = data[i]
        instance = Instance(tuple(row["metadata"]["numbers"]), row["metadata"]["target"])
        if instance.key in taken or held_out(instance) == for_training:
            continue
        if solvable(instance):
            taken.add(instance.key)
            found.append(instance)
    raise ValueError(
        f"Countdown with numbers up to {MAX_VALUE} gave {len(found)} new problems, not {n}."
    )


def worked_solution(instance: Instance, rng: random.Random, c: Carelessness) -> str:
    """A search for the solution as the demonstrator writes it, ending in an answer."""
    target = instance.target
    words: list[str] = []
    failures = 0
    untried = list(branches(instance.numbers))
    if rng.random() < c.hasty:
        branch = _next_branch(untried, target, rng, replace(c, insight=0.0))
        second = min(branch.seconds, key=lambda s: (abs(s.value - target), s.op))
        final = _answer(branch.first, second, branch.rest, rng, c)
        return " ".join(["guess", "<answer>", final, "</answer>"])
    answer: tuple[Step, Step, int] | None = None
    while answer is None:
        branch = _next_branch(untried, target, rng, c)
        untried.remove(branch)
        first = _calculate(branch.first, rng, c)
        words += [str(first), ","]
        seconds = list(steps(first.value, branch.rest))
        while seconds and answer is None:
            second = min(seconds, key=lambda s: (abs(s.value - target), s.op))
            seconds.remove(second)
            said = _calculate(second, rng, c)
            hit = said.value == target
            if not hit and rng.random() < c.wishful + c.impatience * failures:
                said, hit = Step(second.left, second.op, second.right, target), True
            elif hit and rng.random() < c.overlook:
                hit = False
            words += [str(said), "yes" if hit else "no"]
            failures += not hit
            stop = failures >= c.patience or (not hit and rng.random() < c.give_up)
            if hit or stop or (not untried and not seconds):
                words += [] if hit else ["guess"]
                answer = (branch.first, second, branch.rest)
            elif seconds and (not untried or rng.random() < 0.2):
                words.append(",")
            else:
                break
        if answer is None:
            words.append("back")
    return " ".join([*words, "<answer>", _answer(*answer, rng, c), "</answer>"])


def _next_branch(untried: list[Branch], target: int, rng: random.Random, c: Carelessness) -> Branch:
    good = [b for b in untried if any(s.value == target for s in b.seconds)]
    if good and rng.random() < c.insight:
        return rng.choice(good)

    def appeal(branch: Branch) -> float:
        distance = math.log1p(abs(branch.first.value - target)) / 5
        return -distance / c.temperature - math.log(-math.log(rng.random()))

    return max(untried, key=appeal)


def _calculate(step: Step, rng: random.Random, c: Carelessness) -> Step:
    if rng.random() >= c.miscalculate:
        return step
    wrong = step.value + rng.choice((-10, -2, -1, 1, 2, 10))
    return Step(step.left, step.op, step.right, min(max(wrong, 1), MAX_NUMBER))


def _answer(first: Step, second: Step, rest: int, rng: random.Random, c: Carelessness) -> str:
    first_op, second_op = first.op, second.op
    if rng.random() < c.miscopy:
        if rng.random() < 0.5:
            first_op = rng.choice([op for op in "+-*/" if op != first_op])
        else:
            second_op = rng.choice([op for op in "+-*/" if op != second_op])
    inner = f"( {first.left} {first_op} {first.right} )"
    if second.left == rest and second.right != rest:
        return f"{rest} {second_op} {inner}"
    return f"{inner} {second_op} {rest}"
