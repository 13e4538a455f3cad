"""Where rows wait until their request finishes: a store indexed by KV slot, and its tracker.

A row lives where the key of its token lives. That follows the life of the KV cache by itself:
no copy per step, no growth, nothing to free. A row is written only in the step in which its
request computes it to choose a token; the slot remembers for which request, so a row that was
never written, or was overwritten by another request, is seen as missing and not as data.

The tracker learns of requests from the scheduler's output and reads a request's own rows out of
the store when it finishes, or when it is preempted and is about to lose its blocks: what was
captured when a token was chosen is kept, whatever blocks the request resumes on.

Axes: slots of the KV cache, T generated tokens, L traced layers, H head groups, F features,
K `TOKEN_STATISTICS`.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from pivottrace_verl.attention.config import EXTRA_ARGS_NAME, TOKEN_STATISTICS

logger = logging.getLogger(__name__)

NOBODY = 0
"""Owner of a slot that holds no row; requests count from 1."""


class RequestState(Protocol):
    """What is read of the model runner's own record of a request."""

    block_ids: tuple[list[int], ...]
    output_token_ids: list[int]


class SendTrace(Protocol):
    def __call__(
        self, key: str, stats: np.ndarray, tokens: np.ndarray, missing_rows: int
    ) -> None: ...


class SlotStore:
    """stats [slots, L, H, F] and token statistics [slots, K], with the request that owns each slot.

    Memory is 4 (L H F + K + 1) bytes per slot; pages of slots never used are never touched.
    """

    def __init__(self, n_slots: int, n_layers: int, n_groups: int, n_features: int) -> None:
        self.stats = torch.empty(n_slots, n_layers, n_groups, n_features)
        self.tokens = torch.empty(n_slots, len(TOKEN_STATISTICS))
        self.owner = torch.zeros(n_slots, dtype=torch.int32)

    def write_layer(self, layer: int, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Rows [N, H, F] of one traced layer."""
        self.stats[:, layer].index_copy_(0, slots, rows)

    def write_tokens(self, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        """Token statistics [N, K]."""
        self.tokens.index_copy_(0, slots, tokens)

    def own(self, slots: torch.Tensor, owners: np.ndarray) -> None:
        """Last write of a step: whose rows [N] these now are."""
        self.owner.numpy()[slots.numpy()] = owners

    def read(self, slots: np.ndarray, owner: int) -> tuple[np.ndarray, np.ndarray, int]:
        """stats [T, L, H, F], token statistics [T, K], and how many rows are not this owner's."""
        index = torch.from_numpy(slots)
        missing = int((self.owner[index] != owner).sum())
        return self.stats[index].numpy(), self.tokens[index].numpy(), missing


@dataclass
class Tracked:
    """A request that asked for its trace."""

    key: str
    owner: int
    prompt_length: int
    response_start: int
    """Position of the rollout's first generated token: `prompt_length`, or less where this request
    goes on with a rollout that an earlier one began."""
    saved: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    """Rows read at preemptions, in order."""
    missing_rows: int = 0
    n_scheduled: int = 0
    """Rows it has by what was scheduled for it."""

    @property
    def n_saved(self) -> int:
        return sum(len(tokens) for _, tokens in self.saved)

    def cut(self, n_rows: int) -> None:
        """Forget saved rows past the first `n_rows`."""
        while self.n_saved > n_rows:
            stats, tokens = self.saved.pop()
            keep = n_rows - self.n_saved
            if keep > 0:
                self.saved.append((stats[:keep], tokens[:keep]))


class Tracker:
    """Requests that opted in, from their first schedule to their last.

    How many rows a request has is read from the runner's record of its output tokens. Where that
    record is not kept in time (stages of a pipeline before the last, asynchronous scheduling)
    `scheduled_rows` counts what was scheduled instead: draft tokens that were rejected last, or a
    step past a stop, may leave rows at the end that belong to no token, for the receiver to cut.
    """

    def __init__(
        self,
        store: SlotStore,
        block_size: int,
        group: int,
        send: SendTrace,
        scheduled_rows: bool = False,
    ) -> None:
        self.requests: dict[str, Tracked] = {}
        self.preemptions = 0
        self._store = store
        self._block_size = block_size
        self._group = group
        self._send = send
        self._scheduled_rows = scheduled_rows
        self._next_owner = NOBODY + 1

    def observe(self, scheduled: Any, states: Mapping[str, RequestState]) -> None:
        """Take a SchedulerOutput, before the runner acts on it: blocks that were freed may be
        written in this very step, and `states` still holds the requests that finished."""
        for req_id in scheduled.finished_req_ids:
            self._finish(req_id, states)
        for req_id in scheduled.preempted_req_ids or ():
            tracked = self.requests.get(req_id)
            if tracked is not None:
                self._save(tracked, states[req_id])
                self.preemptions += 1
        for new in scheduled.scheduled_new_reqs:
            self._start(new)
        if self._scheduled_rows:
            self._count(scheduled)

    def flush(self, states: Mapping[str, RequestState]) -> None:
        """Finish every tracked request now."""
        for req_id in list(self.requests):
            self._finish(req_id, states)

    def rows_of(self, req_ids: Iterable[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(prompt length, response start, owner) of each request of a batch; owner NOBODY if it
        did not opt in."""
        found = [self.requests.get(req_id) for req_id in req_ids]
        prompts = np.array([t.prompt_length if t else 0 for t in found], np.int64)
        starts = np.array([t.response_start if t else 0 for t in found], np.int64)
        return prompts, starts, np.array([t.owner if t else NOBODY for t in found], np.int32)

    def _start(self, new: Any) -> None:
        asked = asked_by(new, new.req_id in self.requests)
        if asked is None:
            self.requests.pop(new.req_id, None)
            return
        self.requests[new.req_id] = Tracked(
            asked.key, self._next_owner, asked.prompt_length, asked.response_start
        )
        self._next_owner = self._next_owner % (2**31 - 1) + 1

    def _count(self, scheduled: Any) -> None:
        """Note how many rows each request will have after this step."""
        cached = scheduled.scheduled_cached_reqs
        for req_id, n_tokens in zip(cached.req_ids, cached.num_output_tokens, strict=True):
            tracked = self.requests.get(req_id)
            if tracked is not None and req_id in cached.resumed_req_ids:
                tracked.cut(n_tokens)
        computed = {new.req_id: new.num_computed_tokens for new in scheduled.scheduled_new_reqs}
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for req_id, n_computed in computed.items():
            tracked = self.requests.get(req_id)
            if tracked is not None:
                end = n_computed + scheduled.num_scheduled_tokens[req_id]
                tracked.n_scheduled = max(end - (tracked.prompt_length - 1), tracked.n_saved)

    def _finish(self, req_id: str, states: Mapping[str, RequestState]) -> None:
        tracked = self.requests.pop(req_id, None)
        if tracked is None:
            return
        if req_id in states:
            self._save(tracked, states[req_id])
        if not tracked.saved:
            return  # aborted before its first token
        stats = np.concatenate([stats for stats, _ in tracked.saved])
        tokens = np.concatenate([tokens for _, tokens in tracked.saved])
        self._send(tracked.key, stats, tokens, tracked.missing_rows)

    def _save(self, tracked: Tracked, state: RequestState) -> None:
        """Read the rows captured since the last save: positions P-1+n_saved to P-2+n_rows."""
        n_rows = tracked.n_scheduled if self._scheduled_rows else len(state.output_token_ids)
        first = tracked.prompt_length - 1 + tracked.n_saved
        end = tracked.prompt_length - 1 + n_rows
        if end <= first:
            return
        positions = np.arange(first, end)
        blocks = np.asarray(state.block_ids[self._group], np.int64)
        slots = blocks[positions // self._block_size] * self._block_size
        stats, tokens, missing = self._store.read(
            slots + positions % self._block_size, tracked.owner
        )
        tracked.saved.append((stats, tokens))
        tracked.missing_rows += missing


@dataclass(frozen=True)
class Asked:
    """What a request that wants its trace says of itself."""

    key: str
    prompt_length: int
    response_start: int
    """Position of the rollout's first generated token: `prompt_length`, or less where this request
    goes on with a rollout that an earlier one began."""


def asked_by(new: Any, known: bool) -> Asked | None:
    """What a new request (`known`: of an id that runs already) asked for; None if nothing, or
    nothing that can be traced, which is told. Its own id is not read: callers choose it."""
    extra = getattr(new.sampling_params, "extra_args", None) or {}
    asked = extra.get(EXTRA_ARGS_NAME)
    if asked is None:
        return None
    if not well_formed(asked):
        logger.warning(
            "Request %s gets no attention trace: extra_args[%r] must be {'key': '<unique string>'} "
            "and may have 'prompt_tokens', a whole number; it is %r.",
            new.req_id,
            EXTRA_ARGS_NAME,
            asked,
        )
        return None
    if new.prompt_token_ids is None or known:
        logger.warning(
            "Request %s gets no attention trace: prompts given as embeddings and requests "
            "that are extended while they run are not traced.",
            new.req_id,
        )
        return None
    length = len(new.prompt_token_ids)
    return Asked(asked["key"], length, min(asked.get("prompt_tokens", length), length))


def well_formed(asked: Any) -> bool:
    """Whether this, of a request's extra arguments, asks for a trace as it should."""
    if not isinstance(asked, dict) or not set(asked) <= {"key", "prompt_tokens"}:
        return False
    key, prompt_tokens = asked.get("key"), asked.get("prompt_tokens", 1)
    if not isinstance(key, str) or not key or isinstance(prompt_tokens, bool):
        return False
    return isinstance(prompt_tokens, int) and prompt_tokens > 0
