"""The rollouts of one prompt on their way to one verdict.

Contract: no verl. The sessions of a prompt are coroutines of one event loop; each arrives with what
a vote asks of its rollout, or leaves without one, and waits until all have. Then pivots are counted
and the group is judged, once for all of them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from numpy.typing import NDArray

from pivottrace_verl.answers import TIMED_OUT, Answer, AnswerKind, takes_many
from pivottrace_verl.pivots import DetectorConfig, counts_of
from pivottrace_verl.training.groups import Verdict, VotePolicy, judge


@dataclass(frozen=True)
class Scored:
    """What the reward worker said of one rollout, and what its vote may weigh by."""

    answer: Answer
    score: float
    """The reward function's."""
    managed: float
    """What the reward manager made of it: the reward that stock verl trains on."""
    right: bool
    """By the reward function's `acc`, if it has one: scores may be -1 and 1, or hold a bonus."""
    logprob: float | None = None
    """Mean over its tokens, if known."""
    signals: Sequence[NDArray[Any]] | None = None
    """What pivots are found in, [T] of each turn; None: it was not traced."""

    @classmethod
    def of(
        cls,
        managed: float,
        info: Mapping[str, Any],
        answer: Answer,
        logprob: float | None = None,
        signals: Sequence[NDArray[Any]] | None = None,
    ) -> Scored:
        """From verl's `reward_score` and `reward_extra_info`. verl calls a function's bare score
        `acc`; where the agent loop gave the reward itself, there is neither."""
        score = float(info.get("score", info.get("acc", managed)))
        right = float(info.get("acc", score)) > 0.5
        answer = TIMED_OUT if info.get("timed_out") else answer
        return cls(answer, score, float(managed), right, logprob, signals)


class Group:
    """The rollouts of one prompt on their way to one verdict."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._arrived: dict[int, Scored] = {}
        self._left: set[int] = set()
        self._complete = asyncio.Event()
        self._verdict: asyncio.Task[Verdict] | None = None
        self.seconds = 0.0
        """Spent on the verdict."""
        self.pivots: list[int | None] = []
        """Of each rollout by its place in the verdict, once there is one; None: not traced."""

    @property
    def failed(self) -> int:
        """Sessions that left, once the group is complete."""
        return len(self._left)

    @property
    def all_failed(self) -> bool:
        return len(self._left) == self._size

    def arrive(self, session: int, rollout: Scored) -> None:
        """A scored rollout is in."""
        self._arrived[session] = rollout
        self._look()

    def leave(self, session: int) -> None:
        """A session failed; the others vote without it."""
        if session not in self._arrived:
            self._left.add(session)
            self._look()

    def _look(self) -> None:
        if len(self._arrived) + len(self._left) == self._size:
            self._complete.set()

    async def verdict(
        self,
        session: int,
        *,
        labeled: bool,
        kind: AnswerKind,
        policy: VotePolicy,
        detector: DetectorConfig,
    ) -> tuple[int, Verdict]:
        """This session's place in the verdict, and the verdict, once the group is complete."""
        await self._complete.wait()
        order = sorted(self._arrived)
        if self._verdict is None:
            rollouts = [self._arrived[s] for s in order]

            def decide() -> Verdict:
                self.pivots = pivot_counts(rollouts, detector)
                start = time.perf_counter()
                verdict = judge(
                    [rollout.answer for rollout in rollouts],
                    [rollout.score for rollout in rollouts],
                    labeled=labeled,
                    kind=kind,
                    policy=policy,
                    weights=[
                        policy.weight_of(rollout.logprob, pivots)
                        for rollout, pivots in zip(rollouts, self.pivots, strict=True)
                    ],
                    managed=[rollout.managed for rollout in rollouts],
                    right=[rollout.right for rollout in rollouts],
                )
                self.seconds = time.perf_counter() - start
                return verdict

            async def decided() -> Verdict:
                # Whoever asks the workers waits for them: off the event loop. Else a thread would
                # only hold the interpreter as long, and cost more than most verdicts.
                return await asyncio.to_thread(decide) if takes_many(kind) else decide()

            self._verdict = asyncio.ensure_future(decided())
        return order.index(session), await self._verdict


def pivot_counts(rollouts: Sequence[Scored], detector: DetectorConfig) -> list[int | None]:
    """[G] of each rollout, all its turns together; None where it was not traced."""
    signals = [rollout.signals for rollout in rollouts]
    counts = iter(counts_of([row for rows in signals for row in rows or ()], detector))
    return [None if rows is None else sum(islice(counts, len(rows))) for rows in signals]
