"""Which requests are traced on the device, where their rows are, and when these are sent.

What `store.Tracker` is for the CPU backend, with two differences. It looks at nothing but the
scheduler's output, so it serves both of vLLM's model runners and asynchronous scheduling, where the
runner's own record of a request holds placeholders: a request has a row for each position from
P - 1 that the scheduler had computed. And it never waits for the device while there is work: rows
of a request that finished, or lost its blocks, are asked for before the step's forward pass, and
sent once they are here.

Under asynchronous scheduling a request that stopped may have been scheduled once more; the row
after its last token is cut by the receiver, which knows the tokens (`Receiver.get(n_tokens=...)`).

Axes: T rows, L traced layers, G head groups, F features, K `TOKEN_STATISTICS`; P prompt length.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pivottrace_verl.attention.device_store import DeviceStore, Reading
from pivottrace_verl.attention.store import NOBODY, SendTrace, asked_by


@dataclass
class TracedRequest:
    """A request that asked for its trace."""

    key: str
    owner: int
    prompt_length: int
    response_start: int
    """Position of the rollout's first generated token: `prompt_length`, or less where this request
    goes on with a rollout that an earlier one began."""
    blocks: list[int]
    """Its blocks in the traced layers' KV cache group, in the scheduler's block size."""
    computed: int = 0
    """Tokens computed when every step so far has run."""
    before: int = 0
    """The same before the step that was scheduled last."""
    preempted: bool = False
    readings: list[Reading] = field(default_factory=list)

    @property
    def n_read(self) -> int:
        return sum(reading.n_rows for reading in self.readings)

    def keep(self, n_rows: int) -> None:
        """Forget rows that were read beyond the first `n_rows`: their tokens were taken back."""
        while self.n_read > n_rows:
            last = self.readings[-1]
            last.n_rows = max(0, last.n_rows - (self.n_read - n_rows))
            if last.n_rows == 0:
                self.readings.pop()


class DeviceTracker:
    """Requests that opted in, from their first schedule until their trace is sent."""

    def __init__(self, store: DeviceStore, block_size: int, group: int, send: SendTrace) -> None:
        self.requests: dict[str, TracedRequest] = {}
        self.preemptions = 0
        self._store = store
        self._block_size = block_size
        self._group = group
        self._send = send
        self._next_owner = NOBODY + 1
        self._leaving: deque[TracedRequest] = deque()

    def observe(self, scheduled: Any) -> None:
        """Take a SchedulerOutput before the runner acts on it."""
        for req_id in scheduled.finished_req_ids:
            self._finish(req_id)
        for req_id in scheduled.preempted_req_ids or ():
            request = self.requests.get(req_id)
            if request is not None:
                self._read(request)
                request.preempted = True
                self.preemptions += 1
        for new in scheduled.scheduled_new_reqs:
            self._start(new)
        cached = scheduled.scheduled_cached_reqs
        for i, req_id in enumerate(cached.req_ids):
            request = self.requests.get(req_id)
            if request is not None:
                self._continue(request, cached, i)
        for req_id, blocks in (getattr(scheduled, "block_table_updates", None) or {}).items():
            if req_id in self.requests:
                self.requests[req_id].blocks = list(blocks[self._group])
        for req_id, n_tokens in scheduled.num_scheduled_tokens.items():
            request = self.requests.get(req_id)
            if request is not None:
                request.before = request.computed
                request.computed += n_tokens
        if scheduled.total_num_scheduled_tokens:
            self._send_what_is_here()
        else:
            self.drain()

    def flush(self) -> None:
        """Finish every tracked request now."""
        for req_id in list(self.requests):
            self._finish(req_id)
        self.drain()

    def drain(self) -> None:
        """Send everything that was read; waits for the device, so only where nothing is to do."""
        while self._leaving:
            self._deliver(self._leaving.popleft())

    def rows_of(self, req_ids: Iterable[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(prompt length, response start, owner) of each request of a batch; -1, -1 and NOBODY of
        one that did not ask."""
        found = [self.requests.get(req_id) for req_id in req_ids]
        prompts = np.array([r.prompt_length if r else -1 for r in found], np.int32)
        starts = np.array([r.response_start if r else -1 for r in found], np.int32)
        return prompts, starts, np.array([r.owner if r else NOBODY for r in found], np.int32)

    def whole(self, req_ids: Iterable[str]) -> list[tuple[int, TracedRequest]]:
        """The requests of a batch all of whose tokens are computed in this step, their prompt and
        what they kept of a response, with their places in it."""
        found = [(i, self.requests.get(req_id)) for i, req_id in enumerate(req_ids)]
        return [(i, r) for i, r in found if r and r.before == 0 and r.computed >= r.prompt_length]

    def _start(self, new: Any) -> None:
        known = self.requests.get(new.req_id)
        if known is not None and known.preempted:
            # vLLM's V2 runner is told of a resumed request as of a new one, its tokens so far
            # in the place of the prompt.
            known.keep(len(new.prefill_token_ids) - known.prompt_length)
            self._resume(known, new.block_ids, new.num_computed_tokens)
            return
        asked = asked_by(new, known is not None)
        if asked is None:
            self.requests.pop(new.req_id, None)
            return
        request = TracedRequest(
            asked.key, self._next_owner, asked.prompt_length, asked.response_start, []
        )
        self.requests[new.req_id] = request
        self._resume(request, new.block_ids, new.num_computed_tokens)
        self._next_owner = self._next_owner % (2**31 - 1) + 1

    def _continue(self, request: TracedRequest, cached: Any, i: int) -> None:
        """What the i-th of the running requests got."""
        blocks = cached.new_block_ids[i]
        if cached.req_ids[i] in cached.resumed_req_ids:
            # Fewer tokens than rows were read: some were taken back and will be chosen again.
            request.keep(cached.num_output_tokens[i])
            self._resume(request, blocks, cached.num_computed_tokens[i])
            return
        if blocks is not None:
            request.blocks.extend(blocks[self._group])
        request.computed = cached.num_computed_tokens[i]

    def _resume(self, request: TracedRequest, blocks: Any, computed: int) -> None:
        request.blocks = list(blocks[self._group])
        request.computed = computed
        request.preempted = False

    def _finish(self, req_id: str) -> None:
        request = self.requests.pop(req_id, None)
        if request is None:
            return
        self._read(request)
        if request.readings:
            self._leaving.append(request)

    def _read(self, request: TracedRequest) -> None:
        """Ask for the rows since the last read: positions P - 1 + n_read to computed - 1."""
        first = request.prompt_length - 1 + request.n_read
        if request.computed <= first:
            return
        positions = np.arange(first, request.computed)
        blocks = np.asarray(request.blocks, np.int64)[positions // self._block_size]
        slots = blocks * self._block_size + positions % self._block_size
        request.readings.append(self._store.read(slots, request.owner))

    def _send_what_is_here(self) -> None:
        while self._leaving and all(reading.ready for reading in self._leaving[0].readings):
            self._deliver(self._leaving.popleft())

    def _deliver(self, request: TracedRequest) -> None:
        stats, tokens, missing = zip(*(r.wait() for r in request.readings), strict=True)
        self._send(request.key, np.concatenate(stats), np.concatenate(tokens), sum(missing))
