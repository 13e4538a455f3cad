"""Answers: taken out of a rollout's text, compared, clustered, voted on.

Contract: an `AnswerKind` turns text into an answer (None = unparseable, which is not the same as
wrong) and says which answers are equal. Votes depend on the set of answers only, never on their
order. Kinds: `math`, `exact`, `expression`, or a factory of one's own as `pkg.module:factory`.

    kind = get_answers("expression")
    vote = cluster([kind.extract(text) for text in rollouts], kind)
    majority(vote)                       # None on a tie

Axes: G rollouts of a prompt.
"""

import importlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol, runtime_checkable

from pivottrace_verl.answer_kinds import ExactAnswers, ExpressionAnswers, MathAnswers
from pivottrace_verl.errors import PivotTraceError


@runtime_checkable
class AnswerKind(Protocol):
    """What an answer is for one family of problems. Stateless; called from several threads."""

    def extract(self, text: str) -> str | None:
        """The answer in a rollout's text; None if there is none that can be compared."""

    def equal(self, a: str, b: str) -> bool:
        """Whether two answers, labels or one of each mean the same."""

    def canonical(self, label: str) -> str | None:
        """The label (or answer) in one agreed spelling; None if it cannot be parsed."""


KINDS: dict[str, type[AnswerKind]] = {
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
            f"The answers kind '{kind}' is neither {', '.join(KINDS)} nor 'pkg.module:factory'."
        )
    try:
        made = getattr(importlib.import_module(module), factory)()
    except (ImportError, AttributeError, TypeError) as error:
        raise PivotTraceError(f"The answers kind '{kind}' cannot be made: {error}.") from error
    if not isinstance(made, AnswerKind):
        raise PivotTraceError(
            f"The answers kind '{kind}' made a {type(made).__name__}, which lacks extract, equal "
            "or canonical."
        )
    return made


@dataclass(frozen=True)
class Clusters:
    """The answers of one prompt's rollouts, grouped by meaning."""

    clusters: list[tuple[str, int]]
    """(representative, count), by count descending, then by representative."""
    labels: list[int]
    """[G] the cluster of each rollout, -1 where it is unparseable."""
    unparseable: int
    """Rollouts without an answer."""


def cluster(answers: Sequence[str | None], kind: AnswerKind | str) -> Clusters:
    """[G] answers -> equivalence classes, whatever the order of the rollouts.

    `equal` need not be transitive (math-verify rounds); its transitive closure is taken, in
    both directions of every pair. The representative is the smallest by (length, text).
    """
    kind = get_answers(kind) if isinstance(kind, str) else kind
    distinct = sorted({a for a in answers if a is not None}, key=lambda a: (len(a), a))
    parent = list(range(len(distinct)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for j, b in enumerate(distinct):
        for i, a in enumerate(distinct[:j]):
            low, high = sorted((root(i), root(j)))
            if low != high and (kind.equal(a, b) or kind.equal(b, a)):
                parent[high] = low
    # The root is the smallest index of its class, hence the representative.
    home = {a: distinct[root(i)] for i, a in enumerate(distinct)}
    counts = Counter(home[a] for a in answers if a is not None)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], len(item[0]), item[0]))
    place = {representative: i for i, (representative, _) in enumerate(ranked)}
    labels = [-1 if a is None else place[home[a]] for a in answers]
    return Clusters(clusters=ranked, labels=labels, unparseable=labels.count(-1))


def agreement(clusters: Clusters) -> float:
    """Share of all rollouts, unparseable ones included, that gave the top answer; in [0, 1]."""
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


def correct(answer: str | None, label: str, kind: AnswerKind | str) -> bool:
    """Whether the answer means the same as the label; an unparseable answer does not."""
    kind = get_answers(kind) if isinstance(kind, str) else kind
    return answer is not None and kind.equal(answer, label)
