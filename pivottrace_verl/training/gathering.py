"""The rollouts of one prompt on their way to one verdict.

Contract: no verl. The sessions of a prompt are coroutines of one event loop; each arrives with what
the reward worker said of its rollout, or leaves without one, and waits until all have. The group is
judged once, off the event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pivottrace_verl.answers import TIMED_OUT, Answer, AnswerKind
from pivottrace_verl.training.groups import Verdict, VotePolicy, judge


@dataclass(frozen=True)
class Scored:
    """What the reward worker said of one rollout."""

    answer: Answer
    score: float
    """The reward function's."""
    managed: float
    """What the reward manager made of it: the reward that stock verl trains on."""
    right: bool
    """By the reward function's `acc`, if it has one: scores may be -1 and 1, or hold a bonus."""
    weight: float | None
    """Of its vote."""

    @classmethod
    def of(
        cls, managed: float, info: Mapping[str, Any], answer: Answer, weight: float | None
    ) -> Scored:
        """From verl's `reward_score` and `reward_extra_info`. verl calls a function's bare score
        `acc`; where the agent loop gave the reward itself, there is neither."""
        score = float(info.get("score", info.get("acc", managed)))
        right = float(info.get("acc", score)) > 0.5
        answer = TIMED_OUT if info.get("timed_out") else answer
        return cls(answer, score, float(managed), right, weight)


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
        self, session: int, *, labeled: bool, kind: AnswerKind, policy: VotePolicy
    ) -> tuple[int, Verdict]:
        """This session's place in the verdict, and the verdict, once the group is complete."""
        await self._complete.wait()
        order = sorted(self._arrived)
        if self._verdict is None:
            rollouts = [self._arrived[s] for s in order]

            def decide() -> Verdict:
                start = time.perf_counter()
                verdict = judge(
                    [rollout.answer for rollout in rollouts],
                    [rollout.score for rollout in rollouts],
                    labeled=labeled,
                    kind=kind,
                    policy=policy,
                    weights=[rollout.weight for rollout in rollouts],
                    managed=[rollout.managed for rollout in rollouts],
                    right=[rollout.right for rollout in rollouts],
                )
                self.seconds = time.perf_counter() - start
                return verdict

            # Equivalence of mathematical answers can take milliseconds: off the event loop.
            self._verdict = asyncio.ensure_future(asyncio.to_thread(decide))
        return order.index(session), await self._verdict
