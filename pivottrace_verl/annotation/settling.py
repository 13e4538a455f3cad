"""What annotators said of a prompt, in this file and in earlier ones, and the label it becomes.

Contract: `importing` states the rules. Nothing is written here: `Outcome` collects what an import
has to tell and to keep.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pivottrace_verl.annotation.agreement import classes, resolve
from pivottrace_verl.annotation.formats.rows import Annotation, Fault
from pivottrace_verl.annotation.results import Dispute
from pivottrace_verl.answers import AnswerKind
from pivottrace_verl.ledger import Ledger


class Word(NamedTuple):
    """What one annotator said of one prompt."""

    label: str
    cost: float


Said = dict[str, Word]
"""Annotator -> what they said of one prompt, in the order of the files."""


def by_prompt(
    rows: Iterable[Annotation], annotator: str, cost: float, kind: AnswerKind
) -> tuple[dict[str, Said], int, list[Fault]]:
    """What each annotator said of each prompt, the number of repetitions, the contradictions."""
    prompts: dict[str, Said] = {}
    repeated, contradicting = 0, []
    for row in rows:
        said = prompts.setdefault(row.pt_id, {})
        who = row.annotator or annotator
        first = said.get(who)
        if first is None:
            said[who] = Word(str(row.label), float(cost if row.cost is None else row.cost))
        elif _same(first.label, str(row.label), kind):
            repeated += 1
        else:
            reason = f"{row.label!r} after {first.label!r} of the same annotator"
            contradicting.append(Fault(row.where, reason, row.raw))
    return prompts, repeated, contradicting


def _same(a: str, b: str, kind: AnswerKind) -> bool:
    return a == b or kind.equal(a, b)


class Outcome:
    """Running totals over the prompts of one import."""

    def __init__(self) -> None:
        self.already = 0
        self.conflicts: list[tuple[str, str, str]] = []
        self.disputes: list[Dispute] = []
        self.answers: list[list[str]] = []
        """Classes of answers of each prompt, for the agreement."""
        self.open: list[dict[str, Any]] = []
        """Records for conflicts.json."""

    def settle(
        self,
        pt_id: str,
        said: Said,
        earlier: Said,
        stands: str | None,
        kind: AnswerKind,
        rule: str,
    ) -> str | None:
        """The label to buy, None if there is none to buy. `said` is this file's, `earlier` what
        counts beside it, `stands` the ledger's."""
        everyone = {**earlier, **said}
        labels = [word.label for word in everyone.values()]
        answers = classes(labels, kind)
        label = resolve(labels, answers, rule) if stands is None else stands
        self.answers.append(answers)
        if len(set(answers)) > 1:
            self.disputes.append(Dispute(pt_id, list(zip(everyone, labels, strict=True)), label))
        if stands is None:
            if label is None:
                self._keep_open(pt_id, said, None)
            return label
        own = [word.label for word in said.values()]
        now = resolve(own, classes(own, kind), rule)
        # What went into the label is no news, even where the vote went the other way.
        counted = all(who in earlier and earlier[who].label == w.label for who, w in said.items())
        if counted or (now is not None and _same(now, stands, kind)):
            self.already += 1
        elif now is not None:
            self.conflicts.append((pt_id, stands, now))
            self._keep_open(pt_id, said, stands)
        return None

    def _keep_open(self, pt_id: str, said: Said, stands: str | None) -> None:
        pairs = [[who, word.label] for who, word in said.items()]
        costs = [word.cost for word in said.values()]
        self.open.append({"pt_id": pt_id, "said": pairs, "costs": costs, "ledger": stands})


def said_before(ledger: Ledger, kept: Iterable[Mapping[str, Any]], path: str) -> dict[str, Said]:
    """What stands behind the ledger's labels, and what other files said of prompts that are open.

    A record of a prompt that has a label by now is behind that label already, or came after it.
    """
    before: dict[str, Said] = {}
    for entry in ledger.entries():
        parts = entry.get("annotations") or [entry]
        words = {part["annotator"]: Word(part["label"], part["cost"]) for part in parts}
        before.setdefault(entry["pt_id"], words)
    bought = set(before)
    for record in kept:
        if record["pt_id"] not in bought and record["source_file"] != path:
            words = before.setdefault(record["pt_id"], {})
            for (who, label), cost in zip(record["said"], record["costs"], strict=True):
                words[who] = Word(label, cost)
    return before


def bill(said: Said) -> dict[str, Any]:
    """Who is paid what for one label."""
    cost = float(sum(word.cost for word in said.values()))
    out: dict[str, Any] = {"annotator": ", ".join(said), "cost": cost}
    if len(said) > 1:
        out["annotations"] = [{"annotator": who, **word._asdict()} for who, word in said.items()]
    return out
