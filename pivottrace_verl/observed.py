"""What one training step showed of each prompt: a group of rollouts as a few numbers.

Contract: pure; made from the records that the agent loop leaves, one a rollout. Of a prompt without
a bought label nothing is kept that depends on the true answer.

    groups = observed(records)          # records: (group's key, record of a rollout)
    for group in groups: group.pt_id, group.pass_rate, group.values["pivot_density"]

Axes: N groups, G rollouts of a group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MEASURED = ("pivot_density", "pivot_count", "entropy", "nll", "consistency", "length")
"""Estimators whose value training measures anew with every group; the detector is the run's."""

_OF_TRACES = {"pivot_density": "pivot_density", "pivot_count": "pivots", "entropy": "entropy"}


@dataclass(frozen=True)
class Observed:
    """One group."""

    pt_id: str
    route: str
    labeled: bool
    """Whether a rollout of it was compared with a bought label: not if all of them timed out."""
    reward: float
    """Mean of the rewards used."""
    pass_rate: float | None
    """Share of right rollouts among those that did not time out, in [0, 1]; None without a
    label."""
    majority_right: bool | None
    """Whether the vote is right; None without a label."""
    votes: bool
    """Whether the vote is neither tied nor weak."""
    agreement: float
    answer_entropy: float
    """In nats."""
    n_tokens: float
    """Mean length."""
    values: Mapping[str, float]
    """Estimator of MEASURED -> its raw value; absent where it is not known."""


def observed(records: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Observed]:
    """(group's key, record) pairs -> [N] groups, in the order in which they first appear."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for key, record in records:
        groups[key].append(record)
    return [_group(rows) for rows in groups.values()]


def _group(rows: list[Mapping[str, Any]]) -> Observed:
    first = rows[0]
    marks = [row["right"] for row in rows if row["right"] is not None]
    labeled = bool(first["labeled"] and marks)
    length = _mean([row["n_tokens"] for row in rows])
    values = {"consistency": 1.0 - first["agreement"], "length": length}
    traced = [row for row in rows if row["traced"]]
    if traced:
        values |= {
            name: _mean([row[field] for row in traced]) for name, field in _OF_TRACES.items()
        }
    known = [row["logprob"] for row in rows if row["logprob"] is not None]
    if known:
        values["nll"] = -_mean(known)
    return Observed(
        pt_id=first["pt_id"],
        route=first["route"],
        labeled=labeled,
        reward=_mean([row["reward"] for row in rows]),
        pass_rate=_mean(marks) if labeled else None,
        majority_right=first["majority_right"] if labeled else None,
        votes=first["votes"],
        agreement=first["agreement"],
        answer_entropy=first["answer_entropy"],
        n_tokens=length,
        values=values,
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
