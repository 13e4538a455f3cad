"""The tracker reads exactly a request's own rows, whatever happens to its blocks."""

from types import SimpleNamespace

import numpy as np
import torch

from pivottrace_verl.attention.store import NOBODY, SlotStore, Tracker

BLOCK = 4


class Engine:
    """A scheduler's side of the story, just enough of it: blocks, steps, and rows written."""

    def __init__(self, n_blocks=32):
        self.sent = {}
        self.states = {}
        self.store = SlotStore(n_blocks * BLOCK, n_layers=2, n_groups=1, n_features=1)
        self.tracker = Tracker(self.store, BLOCK, group=0, send=self.send)

    def send(self, key, stats, tokens, missing_rows):
        self.sent[key] = (stats, tokens, missing_rows)

    def step(self, new=(), finished=(), preempted=()):
        self.tracker.observe(
            SimpleNamespace(
                finished_req_ids=set(finished),
                preempted_req_ids=set(preempted) or None,
                scheduled_new_reqs=list(new),
            ),
            self.states,
        )
        for req_id in finished:
            self.states.pop(req_id, None)

    def add(self, req_id, prompt, blocks, extra_args=None):
        extra = {"pivottrace": {"key": f"key-{req_id}"}} if extra_args is None else extra_args
        sampling = SimpleNamespace(extra_args=extra)
        new = SimpleNamespace(
            req_id=req_id, prompt_token_ids=[0] * prompt, sampling_params=sampling
        )
        self.step(new=[new])
        self.states[req_id] = SimpleNamespace(block_ids=(blocks,), output_token_ids=[])

    def decode(self, req_id, prompt, value):
        """Compute the row that chooses the next token; every statistic of it is `value`."""
        state = self.states[req_id]
        position = prompt - 1 + len(state.output_token_ids)
        slot = state.block_ids[0][position // BLOCK] * BLOCK + position % BLOCK
        slots = torch.tensor([slot])
        for layer in range(2):
            self.store.write_layer(layer, slots, torch.full((1, 1, 1), value + layer / 2))
        *_, owners = self.tracker.rows_of([req_id])
        tokens = torch.tensor([[-value, 2 * value]])
        self.store.write_tokens(slots, tokens)
        self.store.own(slots, owners)
        state.output_token_ids.append(0)


def values(sent):
    stats, tokens, missing = sent
    assert np.array_equal(stats[:, 1], stats[:, 0] + 0.5)
    assert np.array_equal(tokens[:, 0], -stats[:, 0, 0, 0])
    assert np.array_equal(tokens[:, 1], 2 * stats[:, 0, 0, 0])
    return stats[:, 0, 0, 0].tolist(), missing


def test_a_finished_request_sends_one_row_a_token_in_order():
    engine = Engine()
    engine.add("r", prompt=6, blocks=[5, 2, 9])
    for i in range(6):
        engine.decode("r", 6, float(i))
    engine.step(finished=["r"])
    assert values(engine.sent["key-r"]) == ([0, 1, 2, 3, 4, 5], 0)
    assert not engine.tracker.requests


def test_a_preempted_request_keeps_its_rows_when_others_take_its_blocks():
    engine = Engine()
    engine.add("a", prompt=3, blocks=[1, 2])
    for i in range(3):
        engine.decode("a", 3, float(i))
    engine.step(preempted=["a"])
    engine.add("b", prompt=3, blocks=[1, 2])
    for i in range(4):
        engine.decode("b", 3, 100.0 + i)
    engine.step(finished=["b"])
    # Resumed on other blocks; only the row that chooses the next token is computed anew.
    engine.states["a"].block_ids = ([7, 8],)
    engine.decode("a", 3, 3.0)
    engine.step(preempted=["a"])
    engine.states["a"].block_ids = ([4, 3],)
    engine.decode("a", 3, 4.0)
    engine.step(finished=["a"])
    assert values(engine.sent["key-a"]) == ([0, 1, 2, 3, 4], 0)
    assert values(engine.sent["key-b"]) == ([100, 101, 102, 103], 0)
    assert engine.tracker.preemptions == 2


def test_rows_overwritten_by_another_request_are_missing_not_data():
    engine = Engine()
    engine.add("a", prompt=1, blocks=[1])
    engine.add("b", prompt=1, blocks=[1])
    engine.decode("a", 1, 0.0)
    engine.decode("a", 1, 1.0)
    engine.decode("b", 1, 9.0)
    engine.step(finished=["a", "b"])
    assert engine.sent["key-a"][2] == 1
    assert engine.sent["key-b"][2] == 0


def test_a_slot_never_written_is_missing_not_data():
    engine = Engine()
    engine.add("a", prompt=1, blocks=[1])
    engine.states["a"].output_token_ids = [0, 0]
    engine.step(finished=["a"])
    assert engine.sent["key-a"][2] == 2


def test_a_request_aborted_before_its_first_token_sends_nothing_and_is_forgotten():
    engine = Engine()
    engine.add("a", prompt=5, blocks=[1, 2])
    engine.step(finished=["a"])
    engine.step(finished=["unknown"])
    assert not engine.sent and not engine.tracker.requests


def test_an_id_used_again_in_the_same_step_is_a_new_request():
    engine = Engine()
    engine.add("a", prompt=1, blocks=[1])
    engine.decode("a", 1, 1.0)
    sampling = SimpleNamespace(extra_args={"pivottrace": {"key": "again"}})
    new = SimpleNamespace(req_id="a", prompt_token_ids=[0, 0], sampling_params=sampling)
    engine.step(new=[new], finished=["a"])
    engine.states["a"] = SimpleNamespace(block_ids=([3],), output_token_ids=[])
    engine.decode("a", 2, 2.0)
    engine.step(finished=["a"])
    assert values(engine.sent["key-a"]) == ([1], 0)
    assert values(engine.sent["again"]) == ([2], 0)


def test_requests_that_do_not_ask_are_not_tracked():
    engine = Engine()
    engine.add("a", prompt=1, blocks=[1], extra_args={})
    engine.add("b", prompt=1, blocks=[1], extra_args={"pivottrace": "key"})
    engine.add("c", prompt=1, blocks=[1], extra_args={"pivottrace": {"key": 3}})
    engine.add("d", prompt=2, blocks=[1])
    for i, length in enumerate((0, True, "3")):
        asked = {"key": "k", "prompt_tokens": length}
        engine.add(f"e{i}", prompt=1, blocks=[1], extra_args={"pivottrace": asked})
    engine.add("f", prompt=1, blocks=[1], extra_args={"pivottrace": {"key": "k", "kex": 1}})
    prompts, starts, owners = engine.tracker.rows_of(["a", "d", "b", "c", "e0", "e1", "e2", "f"])
    assert owners.tolist() == [NOBODY, 1, *[NOBODY] * 6]
    assert prompts.tolist() == starts.tolist() == [0, 2, *[0] * 6]


class Stage(Engine):
    """A stage of a pipeline that never sees an output token: rows are counted as scheduled."""

    def __init__(self):
        super().__init__()
        self.tracker = Tracker(self.store, BLOCK, group=0, send=self.send, scheduled_rows=True)

    def schedule(self, req_id, n_computed, n_tokens, n_output=0, resumed=False):
        cached = SimpleNamespace(
            req_ids=[req_id],
            num_computed_tokens=[n_computed],
            num_output_tokens=[n_output],
            resumed_req_ids={req_id} if resumed else set(),
        )
        self.observe(cached, {req_id: n_tokens})

    def observe(self, cached=None, tokens=None, new=(), finished=(), preempted=()):
        nothing = SimpleNamespace(
            req_ids=[], num_computed_tokens=[], num_output_tokens=[], resumed_req_ids=set()
        )
        self.tracker.observe(
            SimpleNamespace(
                finished_req_ids=set(finished),
                preempted_req_ids=set(preempted),
                scheduled_new_reqs=list(new),
                scheduled_cached_reqs=cached or nothing,
                num_scheduled_tokens=tokens or {},
            ),
            self.states,
        )

    def begin(self, req_id, prompt, n_tokens, blocks):
        new = SimpleNamespace(
            req_id=req_id,
            prompt_token_ids=[0] * prompt,
            sampling_params=SimpleNamespace(extra_args={"pivottrace": {"key": req_id}}),
            num_computed_tokens=0,
        )
        self.observe(new=[new], tokens={req_id: n_tokens})
        self.states[req_id] = SimpleNamespace(block_ids=(blocks,), output_token_ids=[])

    def write(self, req_id, position, value):
        block = self.states[req_id].block_ids[0][position // BLOCK]
        slots = torch.tensor([block * BLOCK + position % BLOCK])
        for layer in range(2):
            self.store.write_layer(layer, slots, torch.full((1, 1, 1), value + layer / 2))
        *_, owners = self.tracker.rows_of([req_id])
        tokens = torch.tensor([[-value, 2 * value]])
        self.store.write_tokens(slots, tokens)
        self.store.own(slots, owners)


def test_rows_are_counted_as_scheduled_where_output_tokens_are_not_known():
    stage = Stage()
    stage.begin("a", prompt=6, n_tokens=4, blocks=[1, 2, 3])
    stage.schedule("a", 4, 2)
    stage.write("a", 5, 0.0)
    for i in range(1, 4):
        stage.schedule("a", 5 + i, 1, n_output=i)
        stage.write("a", 5 + i, float(i))
    stage.observe(finished=["a"])
    assert values(stage.sent["a"]) == ([0, 1, 2, 3], 0)
    assert not stage.tracker.requests


def test_a_request_ended_within_its_prompt_has_no_row_by_schedule_either():
    stage = Stage()
    stage.begin("a", prompt=6, n_tokens=4, blocks=[1, 2, 3])
    stage.observe(finished=["a"])
    assert not stage.sent and not stage.tracker.requests


def test_rows_saved_at_a_preemption_are_cut_to_the_tokens_that_counted():
    """Two of three rows saved belong to tokens; the third was a draft, or a step in flight."""
    stage = Stage()
    stage.begin("a", prompt=3, n_tokens=3, blocks=[1, 2])
    stage.write("a", 2, 0.0)
    stage.schedule("a", 3, 2, n_output=1)
    stage.write("a", 3, 1.0)
    stage.write("a", 4, 99.0)
    stage.observe(preempted=["a"])
    stage.states["a"].block_ids = ([5, 6],)
    # Recomputed in two chunks: the first reaches no new row.
    stage.schedule("a", 0, 2, n_output=2, resumed=True)
    stage.schedule("a", 2, 3, n_output=2)
    stage.write("a", 4, 2.0)
    stage.observe(finished=["a"])
    assert values(stage.sent["a"]) == ([0, 1, 2], 0)


def test_a_request_that_goes_on_with_a_rollout_has_its_own_rows_and_the_rollouts_prompt():
    engine = Engine()
    engine.add(
        "a", prompt=6, blocks=[5, 2], extra_args={"pivottrace": {"key": "k", "prompt_tokens": 4}}
    )
    prompts, starts, _ = engine.tracker.rows_of(["a"])
    assert (prompts.tolist(), starts.tolist()) == ([6], [4])
    engine.decode("a", 6, 1.0)
    engine.step(finished=["a"])
    assert values(engine.sent["k"]) == ([1], 0)


def test_the_id_of_a_request_says_nothing_of_its_key():
    engine = Engine()
    for i, req_id in enumerate(("12_ab", "0_ab", "3_4_ab-1a2b")):
        engine.add(req_id, prompt=1, blocks=[i])
        engine.decode(req_id, 1, float(i))
    engine.step(finished=list(engine.states))
    assert {key: values(sent)[0] for key, sent in engine.sent.items()} == {
        "key-12_ab": [0],
        "key-0_ab": [1],
        "key-3_4_ab-1a2b": [2],
    }


def test_flushing_sends_what_is_tracked():
    engine = Engine()
    engine.add("a", prompt=1, blocks=[1])
    engine.decode("a", 1, 1.0)
    engine.tracker.flush(engine.states)
    assert values(engine.sent["key-a"]) == ([1], 0)
