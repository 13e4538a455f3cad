"""Answers: taken out of a rollout's text, compared, clustered, voted on.

Contract: an `AnswerKind` turns text into an answer and says which answers are equal. An answer is
right or wrong, or it is neither: None, unparseable, where there is nothing to compare, and
TIMED_OUT, where the comparison passed the limits of `answer_pool`. Votes depend on the set of
answers only, never on their order.

Kinds: `math` (math-verify), `exact`, `expression`, `reasoning_gym:<task>`, or a factory of one's
own as `pkg.module:factory`, called without arguments (see `answer_own`).

    kind = get_answers("math")
    vote = cluster(extract_many(kind, rollouts), kind)
    majority(vote)                       # None on a tie

Axes: N answers; G rollouts of a prompt.
"""

import enum
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol, TypeGuard, runtime_checkable

from pivottrace_verl.answer_gym import ReasoningGymAnswers
from pivottrace_verl.answer_kinds import ExactAnswers, ExpressionAnswers
from pivottrace_verl.answer_math import MathAnswers
from pivottrace_verl.answer_own import OwnAnswers, make
from pivottrace_verl.answer_pool import TIMED_OUT, Answer, TimedOut
from pivottrace_verl.errors import PivotTraceError

__all__ = [
    "KINDS",
    "NOT_COMPARED",
    "NO_ANSWER",
    "TIMED_OUT",
    "Answer",
    "AnswerKind",
    "Clusters",
    "Grade",
    "ManyAnswers",
    "agreement",
    "canonical_many",
    "cluster",
    "correct",
    "equal_many",
    "extract_many",
    "get_answers",
    "grade",
    "grade_many",
    "majority",
    "takes_many",
]


@runtime_checkable
class AnswerKind(Protocol):
    """What an answer is for one family of problems. Stateless: what it says may be remembered.

    Answers with one canonical form are equal. A kind may set `canonical_decides = True` where
    only those are: `equal` is then not asked within a vote.
    """

    def extract(self, text: str) -> str | None:
        """The answer in a rollout's text; None if there is none that can be compared."""

    def equal(self, a: str, b: str) -> bool:
        """Whether two answers, labels or one of each mean the same."""

    def canonical(self, label: str) -> str | None:
        """The label (or answer) in one agreed spelling; None if it cannot be parsed."""


class ManyAnswers(AnswerKind, Protocol):
    """A kind that takes many at a time, and tells what timed out: all that ask the workers.

    For one at a time, what timed out is None or False.
    """

    symmetric: bool
    """Whether `equal_many` says the same of a pair and its reverse."""

    def extract_many(self, texts: Sequence[str]) -> list[Answer]: ...

    def equal_many(self, pairs: Sequence[tuple[str, str]]) -> list[bool | TimedOut]: ...

    def canonical_many(self, labels: Sequence[str]) -> list[Answer]: ...


class Grade(enum.StrEnum):
    """How an answer stands to a label."""

    RIGHT = "right"
    WRONG = "wrong"
    UNPARSEABLE = "unparseable"
    TIMED_OUT = "timed_out"


KINDS: dict[str, Callable[[], AnswerKind]] = {
    "math": MathAnswers,
    "exact": ExactAnswers,
    "expression": ExpressionAnswers,
}


@cache
def get_answers(kind: str) -> AnswerKind:
    """The kind by name or by import path; PivotTraceError if there is none."""
    if kind in KINDS:
        return KINDS[kind]()
    module, _, factory = kind.partition(":")
    if not module or not factory:
        raise PivotTraceError(
            f"The answers kind '{kind}' is neither {', '.join(KINDS)} nor 'reasoning_gym:task' nor "
            "'pkg.module:factory'."
        )
    if module == "reasoning_gym":
        return ReasoningGymAnswers(factory)
    try:
        made = make(kind)
    except (ImportError, AttributeError, TypeError) as error:
        raise PivotTraceError(f"The answers kind '{kind}' cannot be made: {error}.") from error
    if not isinstance(made, AnswerKind):
        raise PivotTraceError(
            f"The answers kind '{kind}' made a {type(made).__name__}, which lacks extract, equal "
            "or canonical."
        )
    return OwnAnswers(kind, made)


def extract_many(kind: AnswerKind | str, texts: Sequence[str]) -> list[Answer]:
    """[N] texts -> [N] answers; None is unparseable."""
    kind = _made(kind)
    if takes_many(kind):
        return kind.extract_many(texts)
    return [kind.extract(text) for text in texts]


def canonical_many(kind: AnswerKind | str, labels: Sequence[str]) -> list[Answer]:
    """[N] labels or answers -> [N] canonical forms; None is unparseable."""
    kind = _made(kind)
    if takes_many(kind):
        return kind.canonical_many(labels)
    return [kind.canonical(label) for label in labels]


def equal_many(kind: AnswerKind | str, pairs: Sequence[tuple[str, str]]) -> list[bool | TimedOut]:
    """[N] (answer, label) -> [N] whether they mean the same."""
    kind = _made(kind)
    if takes_many(kind):
        return kind.equal_many(pairs)
    return [kind.equal(a, b) for a, b in pairs]


def grade_many(kind: AnswerKind | str, pairs: Sequence[tuple[Answer, str]]) -> list[Grade]:
    """[N] (answer as extracted, label) -> [N] grades."""
    asked = [(a, label) for a, label in pairs if isinstance(a, str)]
    equal = iter(equal_many(kind, asked))
    grades = []
    for answer, _ in pairs:
        if answer is None:
            grades.append(Grade.UNPARSEABLE)
            continue
        same = TIMED_OUT if answer is TIMED_OUT else next(equal)
        if same is TIMED_OUT:
            grades.append(Grade.TIMED_OUT)
        else:
            grades.append(Grade.RIGHT if same else Grade.WRONG)
    return grades


def grade(answer: Answer, label: str, kind: AnswerKind | str) -> Grade:
    """How one answer, as extracted, stands to the label."""
    return grade_many(kind, [(answer, label)])[0]


def correct(answer: Answer, label: str, kind: AnswerKind | str) -> bool:
    """Whether the answer is known to mean the same as the label; `grade` says why it is not."""
    return grade(answer, label, kind) is Grade.RIGHT


NO_ANSWER = -1
NOT_COMPARED = -2


@dataclass(frozen=True)
class Clusters:
    """The answers of one prompt's rollouts, grouped by meaning."""

    clusters: list[tuple[str, int]]
    """(representative, count), by count descending, then by representative."""
    labels: list[int]
    """[G] the cluster of each rollout, -1 where it is unparseable, -2 where it timed out."""
    unparseable: int
    """Rollouts without an answer."""
    timed_out: int
    """Rollouts whose answer was not read or compared within the limits; they form no cluster."""


def cluster(answers: Sequence[Answer], kind: AnswerKind | str) -> Clusters:
    """[G] answers -> equivalence classes, whatever the order of the rollouts.

    `equal` need not be transitive (math-verify rounds); its transitive closure is taken, in
    both directions of every pair. The representative is the smallest by (length, text).

    Where two classes could not be told apart within the limits, answers are taken out, class by
    class, until all that are left were compared: the class with the most such comparisons first,
    of equals the smallest, of equals in that too all of them. So one rollout with an answer that
    nothing can evaluate costs the group that rollout alone.
    """
    kind = _made(kind)
    distinct = sorted({a for a in answers if isinstance(a, str)}, key=lambda a: (len(a), a))
    parent = list(range(len(distinct)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    def join(i: int, j: int) -> None:
        # The root is the smallest index of its class, hence the representative.
        low, high = sorted((root(i), root(j)))
        parent[high] = low

    forms = canonical_many(kind, distinct)
    first: dict[str, int] = {}
    for i, form in enumerate(forms):
        if isinstance(form, str):
            join(i, first.setdefault(form, i))
    heads = [i for i, form in enumerate(forms) if root(i) == i and form is not TIMED_OUT]
    open_pairs: list[tuple[int, int]] = []
    if not getattr(kind, "canonical_decides", False):
        pairs = [(i, j) for n, j in enumerate(heads) for i in heads[:n]]
        same = _equal_either_way(kind, [(distinct[i], distinct[j]) for i, j in pairs])
        for (i, j), equal in zip(pairs, same, strict=True):
            if equal is TIMED_OUT:
                open_pairs.append((i, j))
            elif equal:
                join(i, j)

    home = {a: root(i) for i, a in enumerate(distinct)}
    sizes = Counter(home[a] for a in answers if isinstance(a, str))
    out = {i for i, form in enumerate(forms) if form is TIMED_OUT}
    out |= _taken_out({(root(i), root(j)) for i, j in open_pairs}, sizes)
    ranked = sorted((i for i in sizes if i not in out), key=lambda i: (-sizes[i], i))
    place = {i: n for n, i in enumerate(ranked)}
    labels = [
        NO_ANSWER if a is None else place.get(home[a], NOT_COMPARED) if a in home else NOT_COMPARED
        for a in answers
    ]
    return Clusters(
        clusters=[(distinct[i], sizes[i]) for i in ranked],
        labels=labels,
        unparseable=labels.count(NO_ANSWER),
        timed_out=labels.count(NOT_COMPARED),
    )


def _equal_either_way(
    kind: AnswerKind, pairs: Sequence[tuple[str, str]]
) -> Sequence[bool | TimedOut]:
    if not takes_many(kind):
        return [kind.equal(a, b) or kind.equal(b, a) for a, b in pairs]
    there = kind.equal_many(pairs)
    if kind.symmetric:
        return there
    back = kind.equal_many([(b, a) for a, b in pairs])
    either = zip(there, back, strict=True)
    return [True if True in both else TIMED_OUT if TIMED_OUT in both else False for both in either]


def _taken_out(pairs: set[tuple[int, int]], sizes: Counter[int]) -> set[int]:
    """The classes to leave out so that no pair is left; `cluster` states the rule."""
    out: set[int] = set()
    # Classes that other comparisons joined are known to be equal.
    left = {frozenset(pair) for pair in pairs if pair[0] != pair[1]}
    while left:
        counts = Counter(i for pair in left for i in pair)
        worst = max((n, -sizes[i]) for i, n in counts.items())
        out |= {i for i, n in counts.items() if (n, -sizes[i]) == worst}
        left = {pair for pair in left if not pair & out}
    return out


def agreement(clusters: Clusters) -> float:
    """Share of all rollouts, unparseable and timed-out ones included, that gave the top answer;
    in [0, 1]."""
    if not clusters.clusters:
        return 0.0
    return clusters.clusters[0][1] / len(clusters.labels)


def majority(clusters: Clusters, quorum: int = 1, min_agreement: float = 0.0) -> str | None:
    """The most frequent answer, or None: on a tie for the top, below `quorum` votes for it, or
    below `min_agreement` of all rollouts."""
    ranked = clusters.clusters
    if not ranked or ranked[0][1] < quorum or agreement(clusters) < min_agreement:
        return None
    if len(ranked) > 1 and ranked[0][1] == ranked[1][1]:
        return None
    return ranked[0][0]


def takes_many(kind: AnswerKind) -> TypeGuard[ManyAnswers]:
    """Whether the kind asks the workers."""
    # isinstance with a protocol would cost more than the comparison of two numbers.
    return hasattr(kind, "equal_many")


def _made(kind: AnswerKind | str) -> AnswerKind:
    return get_answers(kind) if isinstance(kind, str) else kind
