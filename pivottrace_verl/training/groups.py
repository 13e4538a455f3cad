"""The reward of one group: verified where a label was bought, voted where none was.

Contract: pure functions, no verl. A group is the rollouts of one prompt; its reward is decided
once, when every rollout is in, so the order of arrival cannot matter. A tie, an unparseable group
or too little agreement gives no reward to anybody, which GRPO turns into no gradient. A rollout
whose answer could not be compared in time has no vote and no reward, and is marked.
Axes: G rollouts of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pivottrace_verl.answers import (
    NOT_COMPARED,
    TIMED_OUT,
    Answer,
    AnswerKind,
    agreement,
    cluster,
    majority,
)

VERIFIED = "verified"
VOTED = "voted"
NO_VOTE = "no_vote"


@dataclass(frozen=True)
class VotePolicy:
    """When a majority counts as a target."""

    quorum: int = 2
    """Least number of rollouts in the winning cluster."""
    min_agreement: float = 0.0
    """Least share of the whole group, unparseable and timed-out rollouts included, that must
    agree, in [0, 1]."""


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
    timed_out: list[bool]
    """[G] whether the rollout's answer could not be compared in time: with the label where one
    was bought, else with the rest of the group."""


def judge(
    answers: Sequence[Answer],
    verified: Sequence[float],
    *,
    labeled: bool,
    kind: AnswerKind,
    policy: VotePolicy,
) -> Verdict:
    """Decide the rewards of one group.

    `answers` [G] are the extracted answers (None: unparseable; TIMED_OUT: not read, or not
    compared with the label, in time), `verified` [G] the verifier's scores, which are read only
    if `labeled`: without a bought label they mean nothing.
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
        timed_out = [answer is TIMED_OUT for answer in answers]
        return Verdict(list(map(float, verified)), VERIFIED, None, shared, right, timed_out)
    timed_out = [place == NOT_COMPARED for place in clusters.labels]
    if target is None:
        return Verdict([0.0] * len(answers), NO_VOTE, None, shared, None, timed_out)
    # Cluster 0 is the largest; membership, not a second comparison, decides.
    rewards = [float(place == 0) for place in clusters.labels]
    return Verdict(rewards, VOTED, target, shared, None, timed_out)
