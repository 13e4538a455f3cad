"""What an import did, for machines and in a sentence."""

from dataclasses import asdict, dataclass, field
from typing import Any

from pivottrace_verl.annotation.agreement import Agreement


@dataclass(frozen=True)
class Dispute:
    """Annotators gave one prompt different answers."""

    pt_id: str
    said: list[tuple[str, str]]
    """(annotator, label), in the file's order."""
    resolved: str | None
    """The label the rule chose; None: the prompt stays open."""


@dataclass(frozen=True)
class Check:
    """Which labels were read by the answers kind."""

    mode: str
    distinct: int
    """Different labels in the file that the ledger does not know."""
    checked: int
    failed: int
    """Of those checked."""

    def estimate(self) -> float:
        """Labels of the `distinct` ones that likely cannot be read, from the share that failed."""
        return self.distinct * self.failed / self.checked if self.checked else 0.0


@dataclass(frozen=True)
class ImportResult:
    """What an import did."""

    added: int
    """Labels new in the ledger."""
    already: int
    """Labels that mean what the ledger has for the prompt already."""
    empty: int
    """Rows without a label yet."""
    conflicts: list[tuple[str, str, str]] = field(default_factory=list)
    """(pt_id, label in the ledger, label in the file): the ledger's stands."""
    skipped: int = 0
    """Annotations that say the annotator passed the prompt on."""
    disputes: list[Dispute] = field(default_factory=list)
    """Prompts whose annotators differ."""
    agreement: Agreement | None = None
    """None where no prompt has two annotators."""
    rejected: int = 0
    """Bad rows left out."""
    rejected_file: str | None = None
    cost: float = 0.0
    """Booked for the labels added: the sum over their annotations."""
    round: int = 1
    check: Check | None = None
    over_budget: str | None = None
    """By how much the labels bought now exceed the plan's budget, as a sentence."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def open_disputes(self) -> list[Dispute]:
        """Disputes that the rule gave no label."""
        return [dispute for dispute in self.disputes if dispute.resolved is None]

    def sentences(self) -> list[str]:
        """What a person wants to know, the first of each sort of trouble quoted."""
        text = (
            f"{self.added} labels added, {self.already} were in the ledger already, {self.empty} "
            "prompts have no label yet"
        )
        if self.skipped:
            text += f", {self.skipped} were skipped by the annotator"
        if self.conflicts:
            pt_id, before, now = self.conflicts[0]
            text += (
                f"; {len(self.conflicts)} labels differ from the ledger's, which stand (first: "
                f"{pt_id} has {before!r}, the file says {now!r})"
            )
        out = [text + "."]
        if self.agreement is not None:
            found = self.agreement
            alpha = "not defined" if found.alpha is None else f"{found.alpha:.3f}"
            out.append(
                f"{found.prompts} prompts have several annotators: {found.agreement:.1%} of "
                f"{found.pairs} pairs agree, Krippendorff's alpha is {alpha}."
            )
        if self.disputes:
            still = self.open_disputes()
            first = (still or self.disputes)[0]
            said = ", ".join(f"{who}: {label!r}" for who, label in first.said)
            out.append(
                f"Annotators differ on {len(self.disputes)} prompts, {len(still)} of which stay "
                f"open (first: {first.pt_id}, {said})."
            )
        if self.check is not None and self.check.mode != "all":
            out.append(
                f"{self.check.checked} of {self.check.distinct} different labels were checked."
            )
        if self.rejected:
            out.append(f"{self.rejected} bad rows were left out; {self.rejected_file} says why.")
        if self.over_budget:
            out.append(self.over_budget)
        return out

    def sentence(self) -> str:
        """`sentences` in one line."""
        return " ".join(self.sentences())
