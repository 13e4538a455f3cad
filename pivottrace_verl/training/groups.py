"""The reward of one group: verified where a label was bought, voted where none was.

Contract: pure functions, no verl. A group is the rollouts of one prompt; its reward is decided
once, when every rollout is in, so the order of arrival cannot matter. A tie, an unparseable group
or too little agreement gives no reward to anybody, which GRPO turns into no gradient.
Axes: G rollouts of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pivottrace_verl.answers import AnswerKind, agreement, cluster, majority

VERIFIED = "verified"
VOTED = "voted"
NO_VOTE = "no_vote"


@dataclass(frozen=True)
class VotePolicy:
    """When a majority counts as a target."""

    quorum: int = 2
    """Least number of rollouts in the winning cluster."""
    min_agreement: float = 0.0
    """Least share of the whole group, unparseable rollouts included, that must agree, in [0, 1]."""


@dataclass(frozen=True)
class Verdict:
    """What one group is trained on."""

    rewards: list[float]
    """[G] reward of each rollout, in the order given."""
    outcome: str
    """`verified`, `voted` or `no_vote`."""
    target: str | None
    """The voted answer; None for verified groups and groups without a vote."""
    agreement: float
    """Share of the group in its largest cluster, in [0, 1]."""
    majority_right: bool | None
    """Whether the vote would have been right: known only where a label was bought."""


def judge(
    answers: Sequence[str | None],
    verified: Sequence[float],
    *,
    labeled: bool,
    kind: AnswerKind,
    policy: VotePolicy,
) -> Verdict:
    """Decide the rewards of one group.

    `answers` [G] are the extracted answers (None: unparseable), `verified` [G] the verifier's
    scores, which are read only if `labeled`: without a bought label they mean nothing.
    """
    if len(answers) != len(verified):
        raise ValueError(f"a group has {len(answers)} answers but {len(verified)} scores")
    clusters = cluster(answers, kind)
    shared = agreement(clusters)
    target = majority(clusters, quorum=policy.quorum, min_agreement=policy.min_agreement)
    if labeled:
        # The gauge of the vote: how often the majority would have been right where we can know.
        right = majority(clusters) is not None and any(
            score > 0.5 and place == 0
            for place, score in zip(clusters.labels, verified, strict=True)
        )
        return Verdict(list(map(float, verified)), VERIFIED, None, shared, right)
    if target is None:
        return Verdict([0.0] * len(answers), NO_VOTE, None, shared, None)
    # Cluster 0 is the largest; membership, not a second comparison, decides.
    rewards = [float(place == 0) for place in clusters.labels]
    return Verdict(rewards, VOTED, target, shared, None)
