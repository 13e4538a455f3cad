"""The reward of one group: verified where a label was bought, voted where none was.

Contract: pure functions, no verl. A group is the rollouts of one prompt; its reward is decided
once, when every rollout is in, so the order of arrival cannot matter. Where a vote is tied or weak
(below the quorum or the least agreement), `VotePolicy.otherwise` says what happens. A rollout whose
answer could not be compared in time has no vote and teaches nothing, and is marked.

A reward is a score, right or wrong by the label or the vote, and what the reward manager added to
it (such as DAPO's penalty of overlong responses, arXiv 2503.14476), which has nothing to do with
the answer and so is kept whoever gives the score. Where there is no score, nothing is added either:
the group is to look to verl's `filter_groups` like what it is, a group that teaches nothing.
Axes: G rollouts of the prompt, C clusters of equal answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pivottrace_verl.answers import (
    NOT_COMPARED,
    TIMED_OUT,
    Answer,
    AnswerKind,
    Clusters,
    agreement,
    cluster,
)
from pivottrace_verl.errors import PivotTraceError

VERIFIED = "verified"
VOTED = "voted"
SOFT = "soft"
NO_VOTE = "no_vote"
DROPPED = "dropped"

KINDS = ("majority", "weighted", "verified_only")
WEIGHTS = ("certainty", "pivots")
OTHERWISE = ("none", "soft", "drop")
_TIE = 1e-9
"""Shares that differ by less are equal."""


@dataclass(frozen=True)
class VotePolicy:
    """How a group without a label is rewarded."""

    kind: str = "majority"
    """majority: one rollout, one vote (TTRL, arXiv 2504.16084); weighted: by `weight`;
    verified_only: no vote is trusted, and the group is dropped."""
    weight: str = "certainty"
    """Of a rollout's vote where votes are weighted. certainty: exp of the mean log-probability of
    its tokens, in (0, 1]; pivots: 1 / (1 + pivots)."""
    otherwise: str = "none"
    """Where the vote is tied or weak. none: no reward and, whatever the estimator, no advantage;
    soft: the share of the group that gave the same answer is the reward; drop: as none, but
    counted apart."""
    quorum: int = 2
    """Least number of rollouts in the winning cluster."""
    min_agreement: float = 0.0
    """Least share of the whole group's votes, unparseable and timed-out rollouts included, that
    must agree, in [0, 1]."""

    def __post_init__(self) -> None:
        for name, allowed in (("kind", KINDS), ("weight", WEIGHTS), ("otherwise", OTHERWISE)):
            if getattr(self, name) not in allowed:
                raise PivotTraceError(
                    f"The vote's {name} is '{getattr(self, name)}', but must be one of "
                    f"{', '.join(allowed)}."
                )
        if self.quorum < 1 or not 0.0 <= self.min_agreement <= 1.0:
            raise PivotTraceError(
                f"The vote's quorum is {self.quorum} and its min_agreement {self.min_agreement}, "
                "but they must be at least 1 and in [0, 1]."
            )

    def weight_of(self, logprob_mean: float | None, pivots: float | None) -> float | None:
        """Of a rollout's vote; None if what it needs is not known."""
        if self.weight == "certainty":
            return None if logprob_mean is None else math.exp(min(0.0, logprob_mean))
        return None if pivots is None else 1.0 / (1.0 + pivots)


@dataclass(frozen=True)
class Verdict:
    """What one group is trained on."""

    rewards: list[float]
    """[G] reward of each rollout, in the order given; the mean of the others for one that timed
    out, so that it does not move what they are compared with."""
    scores: list[float]
    """[G] the rewards without what the reward manager added."""
    weights: list[float]
    """[G] factor on each rollout's advantages: 0.0 for one that timed out, and for all of a group
    without a reward, since estimators without a baseline by group (REINFORCE++, GAE) would read its
    zeros as wrong answers; else 1.0."""
    right: list[float | None]
    """[G] 1.0 or 0.0 by the label, the score in [0, 1] by the vote; None where it timed out."""
    outcome: str
    """`verified`, `voted`, `soft`, `no_vote` or `dropped`."""
    target: str | None
    """The voted answer; None for verified groups and groups without a vote."""
    agreement: float
    """Share of the group in its largest cluster, in [0, 1]."""
    answer_entropy: float
    """Of the shares of the C clusters among the rollouts that are in one, in nats."""
    majority_right: bool | None
    """Whether the vote would have been right: known only where a label was bought."""
    votes: bool
    """Whether the group's vote is neither tied nor weak."""
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
    weights: Sequence[float | None] | None = None,
    managed: Sequence[float] | None = None,
    right: Sequence[bool] | None = None,
) -> Verdict:
    """Decide the rewards of one group.

    `answers` [G] are the extracted answers (None: unparseable; TIMED_OUT: not read, or not
    compared with the label, in time), `verified` [G] the verifier's scores and `right` [G] whether
    it found the answer right (None: a score above one half), which are read only if `labeled`:
    without a bought label they mean nothing. `managed` [G] is what the reward manager made of the
    scores (None: it left them as they are). `weights` [G] are read where votes are weighted:
    finite, at least 0; one that is not known counts as the mean of the others.
    """
    managed = verified if managed is None else managed
    right = [score > 0.5 for score in verified] if right is None else right
    if not len(answers) == len(verified) == len(managed) == len(right):
        raise ValueError(
            f"a group has {len(answers)} answers but {len(verified)} scores, {len(managed)} "
            f"rewards and {len(right)} marks"
        )
    clusters = cluster(answers, kind)
    shares = _shares(clusters, _vote_weights(len(answers), policy, weights))
    winner = _winner(shares)
    votes = (
        winner is not None
        and clusters.clusters[winner][1] >= policy.quorum
        and shares[winner] >= policy.min_agreement - _TIE
    )
    timed_out = [place == NOT_COMPARED for place in clusters.labels]
    majority_right, target = None, None
    if labeled:
        # The gauge of the vote: how often the majority would have been right where we can know.
        majority_right = winner is not None and any(
            good and place == winner for place, good in zip(clusters.labels, right, strict=True)
        )
        scores, outcome = list(map(float, verified)), VERIFIED
        timed_out = [answer is TIMED_OUT for answer in answers]
    elif policy.kind != "verified_only" and votes and winner is not None:
        # Membership, not a second comparison, decides.
        scores = [float(place == winner) for place in clusters.labels]
        outcome, target = VOTED, clusters.clusters[winner][0]
    elif policy.kind != "verified_only" and policy.otherwise == "soft":
        scores = [shares[place] if place >= 0 else 0.0 for place in clusters.labels]
        outcome = SOFT
    else:
        dropped = policy.kind == "verified_only" or policy.otherwise == "drop"
        scores, outcome = [0.0] * len(answers), DROPPED if dropped else NO_VOTE
    teaches = outcome not in (NO_VOTE, DROPPED)
    marks: Sequence[float] = scores
    if labeled:
        rewards, marks = list(map(float, managed)), list(map(float, right))
    elif teaches:
        each = zip(scores, managed, verified, strict=True)
        rewards = [score + (made - given) for score, made, given in each]
    else:
        rewards = scores
    return Verdict(
        rewards=_filled(rewards, timed_out),
        scores=_filled(scores, timed_out),
        weights=[float(teaches and not late) for late in timed_out],
        right=[None if late else mark for mark, late in zip(marks, timed_out, strict=True)],
        outcome=outcome,
        target=target,
        agreement=agreement(clusters),
        answer_entropy=_entropy([count for _, count in clusters.clusters]),
        majority_right=majority_right,
        votes=votes,
        timed_out=timed_out,
    )


def _filled(values: Sequence[float], missing: Sequence[bool]) -> list[float]:
    """[G] with the mean of the others in place of those that are missing; 0 if all are."""
    known = [value for value, gone in zip(values, missing, strict=True) if not gone]
    mean = math.fsum(known) / len(known) if known else 0.0
    return [mean if gone else value for value, gone in zip(values, missing, strict=True)]


def _vote_weights(
    size: int, policy: VotePolicy, weights: Sequence[float | None] | None
) -> list[float]:
    """[G] the weight of each rollout's vote."""
    if policy.kind != "weighted" or weights is None:
        return [1.0] * size
    if len(weights) != size:
        raise ValueError(f"a group has {size} answers but {len(weights)} weights")
    known = [weight for weight in weights if weight is not None]
    if any(not math.isfinite(weight) or weight < 0 for weight in known):
        raise ValueError(f"a vote's weight is not a number of at least 0: {known}")
    mean = math.fsum(known) / len(known) if known else 1.0
    return [mean if weight is None else weight for weight in weights]


def _shares(clusters: Clusters, weights: Sequence[float]) -> list[float]:
    """[C] of the votes of the whole group; exact sums, so the order cannot matter."""
    total = math.fsum(weights)
    if total == 0.0:
        return [0.0] * len(clusters.clusters)
    held: list[list[float]] = [[] for _ in clusters.clusters]
    for place, weight in zip(clusters.labels, weights, strict=True):
        if place >= 0:
            held[place].append(weight)
    return [math.fsum(votes) / total for votes in held]


def _winner(shares: Sequence[float]) -> int | None:
    """The cluster with the most votes; None on a tie for the top, and without a vote."""
    ranked = sorted(range(len(shares)), key=lambda place: -shares[place])
    if not ranked or shares[ranked[0]] <= 0.0:
        return None
    if len(ranked) > 1 and shares[ranked[0]] - shares[ranked[1]] <= _TIE:
        return None
    return ranked[0]


def _entropy(counts: Sequence[int]) -> float:
    """Of counts, in nats."""
    total = sum(counts)
    return math.fsum(count / total * math.log(total / count) for count in counts)
