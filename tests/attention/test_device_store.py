"""Rows on the device: each step's buffers, the store, and the tracker that reads it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pivottrace_verl.attention.device_store import HOST_BUFFERS, DeviceStore, StepRows
from pivottrace_verl.attention.device_tracker import DeviceTracker
from pivottrace_verl.attention.store import NOBODY

BLOCK = 4


def integers(*values):
    return np.array(values, np.int32)


def test_a_step_fills_its_rows_in_place_and_padding_and_the_step_before_are_gone():
    rows = StepRows(4, "cpu")
    prompts, owners, slots = rows.prompts, rows.owners, rows.slots
    for _ in range(2 * HOST_BUFFERS):
        rows.fill(integers(5, -1, 7), integers(5, -1, 4), integers(1, NOBODY, 2))
        assert prompts.tolist() == [5, -1, 7, -1]
        assert rows.responses.tolist() == [5, -1, 4, -1]
        assert owners.tolist() == [1, NOBODY, 2, -1]
        slots.fill_(9)  # as the kernels do
        rows.fill(integers(3), integers(3), integers(4))
        assert (prompts.tolist(), rows.n_requests) == ([3, -1, -1, -1], 1)
        assert slots.tolist() == [-1] * 4
    rows.clear()
    assert (prompts.tolist(), rows.n_requests) == ([-1] * 4, 0)


def test_a_step_of_which_nobody_asked_copies_nothing_but_knows_its_size():
    rows = StepRows(4, "cpu")
    rows.prompts.fill_(8)  # would be gone if something were copied
    rows.fill(integers(-1, -1), integers(-1, -1), integers(NOBODY, NOBODY))
    assert rows.prompts.tolist() == [8] * 4
    assert rows.n_requests == 2


def test_what_was_read_stays_as_it_was_when_the_slots_are_written_again():
    store = DeviceStore(8, 2, 1, 3, "cpu")
    store.stats[:] = 1.0
    store.tokens[:] = 2.0
    store.owner[:] = torch.tensor([0, 1, 1, 2, 1, 0, 0, 0])
    reading = store.read(np.array([1, 2, 3, 4]), owner=1)
    store.stats[:] = store.tokens[:] = -1.0
    store.owner[:] = 9
    assert reading.ready
    reading.n_rows = 3
    stats, tokens, missing = reading.wait()
    assert (stats.shape, tokens.shape, missing) == ((3, 2, 1, 3), (3, 2), 1)
    assert bool((stats == 1).all())
    assert bool((tokens == 2).all())


@pytest.mark.parametrize("n_rows", [1, 3, 4, 40, 41])
def test_rows_that_leave_through_many_rooms_are_those_that_were_asked_for(n_rows, monkeypatch):
    monkeypatch.setattr("pivottrace_verl.attention.device_store.STAGE_ROWS", 3)
    store = DeviceStore(50, 2, 1, 3, "cpu")
    for values in (store.stats, store.tokens, store.owner):
        values.copy_(torch.arange(values.numel()).view(values.shape))
    slots = np.random.default_rng(0).permutation(50)[:n_rows]
    stats, tokens, missing = store.read(slots, owner=int(slots[0])).wait()
    assert np.array_equal(stats, store.stats.numpy()[slots])
    assert np.array_equal(tokens, store.tokens.numpy()[slots])
    assert missing == n_rows - 1


class Engine:
    """A scheduler's and a device's side of the story, just enough of it.

    `ahead`: asynchronous scheduling, a request that has all its tokens is scheduled once more.
    `again`: a resumed request comes as a new one, as vLLM's V2 runner is told.
    """

    def __init__(self, n_blocks=64, ahead=False, again=False):
        self.sent, self.running, self.chose = {}, {}, {}
        self.free = list(range(n_blocks))
        self.store = DeviceStore(n_blocks * BLOCK, 1, 1, 1, "cpu")
        self.tracker = DeviceTracker(self.store, BLOCK, group=0, send=self.send)
        self.ahead, self.again = ahead, again

    def send(self, key, stats, tokens, missing_rows):
        assert key not in self.sent
        self.sent[key] = (stats[:, 0, 0, 0].tolist(), missing_rows)

    def add(self, req_id, prompt, n_tokens, asks=True):
        extra = {"pivottrace": {"key": req_id}} if asks else None
        self.running[req_id] = SimpleNamespace(
            prompt=prompt,
            wanted=n_tokens,
            tokens=0,
            computed=0,
            blocks=[],
            state="new",
            params=SimpleNamespace(extra_args=extra),
            number=len(self.running) + len(self.sent) + 1,
            extra=int(self.ahead),
            version=0.0,
        )
        self.chose[req_id] = []

    def step(self, budget=7, preempt=(), cached=0, dropped=0):
        """One step; `cached` blocks of a prefix are there already, `dropped` tokens are taken back
        from a request that resumes."""
        finished = {r for r, q in self.running.items() if q.tokens >= q.wanted and q.extra == 0}
        for req_id in finished:
            self.free += self.running.pop(req_id).blocks
        preempted = {r for r in preempt if getattr(self.running.get(r), "state", "") == "on"}
        for req_id in preempted:
            request = self.running[req_id]
            self.free += request.blocks
            request.blocks, request.state = [], "preempted"
        new, on = [], SimpleNamespace(
            req_ids=[], resumed_req_ids=set(), new_block_ids=[], num_computed_tokens=[],
            num_output_tokens=[],
        )  # fmt: skip
        scheduled = {}
        for req_id, q in self.running.items():
            if req_id in preempted:
                continue
            if q.state == "preempted":
                q.tokens = max(0, q.tokens - dropped)
                q.version += dropped / 8
            known = q.prompt + q.tokens
            if q.state != "on":
                q.computed = min(cached, (known - 1) // BLOCK) * BLOCK
            if q.tokens >= q.wanted:
                q.extra -= 1
            n = min(budget, known - q.computed)
            got = -(-(q.computed + n) // BLOCK) - len(q.blocks)
            fresh = [self.free.pop(0) for _ in range(got)]
            q.blocks += fresh
            scheduled[req_id] = n
            if q.state == "new" or (q.state == "preempted" and self.again):
                new.append(
                    SimpleNamespace(
                        req_id=req_id,
                        prompt_token_ids=[0] * q.prompt,
                        sampling_params=q.params,
                        prefill_token_ids=[0] * known,
                        block_ids=(list(q.blocks),),
                        num_computed_tokens=q.computed,
                    )
                )
            else:
                on.req_ids.append(req_id)
                on.new_block_ids.append((fresh,) if fresh else None)
                on.num_computed_tokens.append(q.computed)
                on.num_output_tokens.append(q.tokens)
                if q.state == "preempted":
                    on.resumed_req_ids.add(req_id)
            q.state = "on"
        self.tracker.observe(
            SimpleNamespace(
                finished_req_ids=finished,
                preempted_req_ids=preempted or None,
                scheduled_new_reqs=new,
                scheduled_cached_reqs=on,
                num_scheduled_tokens=scheduled,
                total_num_scheduled_tokens=sum(scheduled.values()),
            )
        )
        self.forward(scheduled)

    def forward(self, scheduled):
        """The kernels write the row of each request's last token, if it is P - 1 or later."""
        prompts, _, owners = self.tracker.rows_of(scheduled)
        for (req_id, n), prompt, owner in zip(scheduled.items(), prompts, owners, strict=True):
            q = self.running[req_id]
            q.computed += n
            position = q.computed - 1
            slot = q.blocks[position // BLOCK] * BLOCK + position % BLOCK
            if prompt >= 0 and position >= prompt - 1:
                self.store.stats[slot] = value = 1000 * q.number + position + q.version
                self.store.tokens[slot] = 0.0
                self.store.owner[slot] = int(owner)
                if q.computed == q.prompt + q.tokens:
                    self.chose[req_id][q.tokens :] = [value]
            if q.computed == q.prompt + q.tokens:
                q.tokens += 1


def rows_wanted(number, prompt, n_tokens):
    return [1000.0 * number + prompt - 1 + i for i in range(n_tokens)]


@settings(max_examples=150, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 15), st.integers(1, 9), st.booleans()), min_size=1, max_size=4
    ),
    ahead=st.booleans(),
    again=st.booleans(),
    steps=st.lists(
        st.tuples(
            st.sampled_from([1, 3, 7]),
            st.sets(st.integers(0, 3), max_size=2),
            st.integers(0, 3),
            st.integers(0, 1),
        ),
        max_size=25,
    ),
)
def test_every_token_has_its_row_whatever_happens_to_its_request(requests, ahead, again, steps):
    engine = Engine(ahead=ahead, again=again)
    for i, (prompt, n_tokens, asks) in enumerate(requests):
        engine.add(str(i), prompt, n_tokens, asks)
    for budget, preempt, cached, dropped in steps:
        engine.step(budget, {str(i) for i in preempt}, cached, dropped)
    while engine.running:
        engine.step()
    engine.step()
    assert set(engine.sent) == {str(i) for i, (_, _, asks) in enumerate(requests) if asks}
    for i, (prompt, n_tokens, asks) in enumerate(requests):
        if asks:
            rows, missing = engine.sent[str(i)]
            assert missing == 0
            assert rows[:n_tokens] == engine.chose[str(i)][:n_tokens]
            assert [int(row) for row in rows[:n_tokens]] == rows_wanted(i + 1, prompt, n_tokens)
            assert len(rows) <= n_tokens + ahead
    assert not engine.tracker.requests


def test_rows_overwritten_by_another_request_are_missing_not_data():
    engine = Engine()
    engine.add("a", prompt=3, n_tokens=4)
    for _ in range(3):
        engine.step()
    blocks = engine.running["a"].blocks
    engine.store.owner[blocks[0] * BLOCK + 2] = 77
    while engine.running:
        engine.step()
    engine.step()
    assert engine.sent["a"][1] == 1


def test_a_row_that_no_kernel_wrote_is_missing_not_data():
    engine = Engine()
    engine.add("a", prompt=3, n_tokens=4)
    engine.forward = lambda scheduled: [
        setattr(engine.running[r], "computed", engine.running[r].computed + n)
        or setattr(engine.running[r], "tokens", engine.running[r].tokens + 1)
        for r, n in scheduled.items()
    ]
    while engine.running:
        engine.step()
    assert engine.sent["a"][1] == 4


def test_a_trace_waits_for_its_rows_while_there_is_work_and_not_when_there_is_none(monkeypatch):
    engine, here = Engine(), []
    engine.add("a", prompt=3, n_tokens=2)
    engine.add("b", prompt=3, n_tokens=6)
    monkeypatch.setattr(
        "pivottrace_verl.attention.device_store.Reading.ready", property(lambda _: bool(here))
    )
    for _ in range(4):
        engine.step()
    assert "a" not in engine.running
    assert not engine.sent
    here.append(True)
    engine.step()
    assert set(engine.sent) == {"a"}
    here.clear()
    while engine.running:
        engine.step()
    assert set(engine.sent) == {"a", "b"}


def test_flushing_sends_what_is_tracked():
    engine = Engine()
    engine.add("a", prompt=3, n_tokens=9)
    engine.step()
    engine.step()
    engine.tracker.flush()
    assert engine.sent == {"a": (rows_wanted(1, 3, 2), 0)}


@pytest.mark.parametrize("again", [False, True])
def test_a_request_aborted_while_it_waits_to_resume_keeps_what_was_read(again):
    engine = Engine(again=again)
    engine.add("a", prompt=3, n_tokens=9)
    for _ in range(3):
        engine.step()
    engine.step(preempt={"a"})
    engine.running["a"].wanted = 0
    engine.step()
    assert engine.sent == {"a": (rows_wanted(1, 3, 3), 0)}
    assert engine.tracker.preemptions == 1


def test_a_request_that_goes_on_with_a_rollout_has_rows_of_its_own_tokens_and_its_response_start():
    engine = Engine()
    engine.add("a", prompt=9, n_tokens=2)
    engine.running["a"].params.extra_args["pivottrace"]["prompt_tokens"] = 5
    engine.step(budget=9)
    prompts, responses, _ = engine.tracker.rows_of(["a"])
    assert (prompts.tolist(), responses.tolist()) == ([9], [5])
    while engine.running:
        engine.step()
    assert engine.sent["a"] == (rows_wanted(1, 9, 2), 0)


def test_requests_that_are_extended_while_they_run_are_not_traced(caplog):
    engine = Engine()
    engine.add("a", prompt=3, n_tokens=9)
    engine.step()
    engine.running["a"].state = "new"
    engine.step()
    assert not engine.tracker.requests
    assert "extended while they run" in caplog.text
