"""Several annotators of a prompt: which label it gets, and how far they agree.

Contract: answers are the same if the run's answers kind says so. `resolve` never guesses: where
its rule gives nothing, the prompt stays open.

Krippendorff's alpha is the coefficient that fits: it takes any number of annotators, who need not
all see the same prompts (Cohen's kappa takes two, Fleiss' a fixed number a prompt), and free
answers, since chance agreement is counted from the answers that were given and not from a list of
categories. K. Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), nominal data:
alpha = 1 - D_o / D_e.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from pivottrace_verl.answers import AnswerKind, canonical_many, cluster
from pivottrace_verl.errors import PivotTraceError

RULES = ("majority", "first", "unanimous")


def check_rule(rule: str) -> None:
    """PivotTraceError unless it is one of `RULES`."""
    if rule not in RULES:
        raise PivotTraceError(
            f"The rule for conflicts is '{rule}', but must be one of {', '.join(RULES)}."
        )


def classes(labels: Sequence[str], kind: AnswerKind) -> list[str]:
    """[N] the representative of each label's class of equal answers; a label that could not be
    compared is a class of its own."""
    if len(set(labels)) == 1:
        return list(labels)
    found = cluster(labels, kind)
    return [
        found.clusters[i][0] if i >= 0 else label
        for label, i in zip(labels, found.labels, strict=True)
    ]


def resolve(labels: Sequence[str], found: Sequence[str], rule: str) -> str | None:
    """One prompt's label from its annotators', in the file's order, or None.

    `found` are their `classes`. `majority`: the answer that more annotators gave than any other,
    a tie gives none; `first`: the first; `unanimous`: the answer of all. In the spelling of the
    first annotator who gave it.
    """
    if rule == "first" or len(set(found)) == 1:
        return labels[0]
    votes = Counter(found).most_common(2)
    if rule == "unanimous" or votes[0][1] == votes[1][1]:
        return None
    return labels[found.index(votes[0][0])]


@dataclass(frozen=True)
class Agreement:
    """How far annotators agree, over the prompts that more than one of them answered."""

    prompts: int
    pairs: int
    """Pairs of annotators of the same prompt."""
    agreement: float
    """Share of those pairs that gave the same answer; in [0, 1]."""
    alpha: float | None
    """Krippendorff's alpha: 1 = perfect, 0 = chance; None where all answers are the same one."""


def agreement(prompts: Sequence[Sequence[str]], kind: AnswerKind) -> Agreement | None:
    """Of the `classes` of each prompt's labels; None if no prompt has two annotators.

    Across prompts two answers are one category if they are written alike in canonical form.
    """
    units = [unit for unit in prompts if len(unit) > 1]
    if not units:
        return None
    pairs = same = n = 0
    observed = 0.0
    answers = list(dict.fromkeys(answer for unit in units for answer in unit))
    forms = dict(zip(answers, canonical_many(kind, answers), strict=True))
    totals: Counter[str] = Counter()
    for unit in units:
        counts = Counter(unit)
        m = len(unit)
        alike = sum(c * (c - 1) for c in counts.values())
        pairs += m * (m - 1) // 2
        same += alike // 2
        observed += (m * (m - 1) - alike) / (m - 1)
        n += m
        for answer, count in counts.items():
            form = forms[answer]
            totals[form if isinstance(form, str) else answer] += count
    expected = (n * n - sum(c * c for c in totals.values())) / (n - 1)
    alpha = None if expected == 0 else 1 - observed / expected
    return Agreement(len(units), pairs, same / pairs, alpha)
