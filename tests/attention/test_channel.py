"""The channel loses nothing silently: traces arrive once, whole, to whom they belong."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time

import msgspec
import numpy as np
import pytest
import zmq

from pivottrace_verl import plugin
from pivottrace_verl.attention import channel
from pivottrace_verl.attention.channel import Receiver, Trace
from pivottrace_verl.attention.config import (
    ENV_CAPTURE,
    ENV_ENDPOINT,
    ENV_TOKEN,
    CaptureConfig,
)
from pivottrace_verl.attention.parts import Part
from pivottrace_verl.attention.sender import Sender
from pivottrace_verl.attention.wire import Header

N_FEATURES = 25


@pytest.fixture
def receiver():
    with Receiver(CaptureConfig()) as receiver:
        yield receiver


def make_sender(token=None, **settings):
    """A worker that said hello, so that it is connected."""
    sender = Sender(os.environ[ENV_ENDPOINT], token or os.environ[ENV_TOKEN], **settings)
    sender.hello({"backend": "CPU_ATTN"})
    return sender


@pytest.fixture
def sender(receiver):
    sender = make_sender()
    yield sender
    sender.close()


def make_rows(n_tokens, seed=0):
    g = np.random.default_rng(seed)
    stats = g.normal(size=(n_tokens, 2, 1, N_FEATURES)).astype(np.float32)
    return stats, g.normal(size=(n_tokens, 2)).astype(np.float32)


def wait_for(receiver, name, value):
    end = time.monotonic() + 5
    while receiver.counters[name] < value and time.monotonic() < end:
        time.sleep(0.01)
    assert receiver.counters[name] == value


def test_a_trace_arrives_as_it_was_sent(receiver, sender):
    stats, tokens = make_rows(7)
    sender.trace("a", stats, tokens, 0)
    trace = receiver.get("a")
    assert trace.key == "a"
    assert np.array_equal(trace.stats, stats)
    assert np.array_equal(trace.token_entropy, tokens[:, 0])
    assert np.array_equal(trace.self_certainty, tokens[:, 1])
    assert trace.stats.dtype == np.float32


def test_half_precision_halves_the_bytes_and_keeps_float32_outside(receiver):
    sender = make_sender(wire="float16")
    stats, tokens = make_rows(3)
    sender.trace("a", stats, tokens, 0)
    trace = receiver.get("a")
    assert np.array_equal(trace.stats, stats.astype(np.float16).astype(np.float32))
    assert np.array_equal(trace.token_entropy, tokens[:, 0])
    sender.close()


def test_rows_past_the_last_token_are_cut(receiver, sender):
    stats, tokens = make_rows(7)
    sender.trace("a", stats, tokens, 0)
    trace = receiver.get("a", n_tokens=5)
    assert np.array_equal(trace.stats, stats[:5])
    assert np.array_equal(trace.token_entropy, tokens[:5, 0])
    assert np.array_equal(trace.self_certainty, tokens[:5, 1])


def make_trace(key, n_tokens, seed=0):
    stats, tokens = make_rows(n_tokens, seed)
    return Trace(key, stats, *tokens.T)


def test_the_parts_of_one_rollout_join_in_order_under_the_first_key():
    whole = make_trace("a", 9)
    parts = [
        Trace(key, whole.stats[i:j], whole.token_entropy[i:j], whole.self_certainty[i:j])
        for key, i, j in (("a", 0, 4), ("a/1", 4, 5), ("a/2", 5, 9))
    ]
    joined = Trace.join(parts)
    assert joined.key == "a"
    assert np.array_equal(joined.stats, whole.stats)
    assert np.array_equal(joined.token_entropy, whole.token_entropy)
    assert np.array_equal(joined.self_certainty, whole.self_certainty)


def test_a_rollout_with_a_part_missing_has_no_trace():
    assert Trace.join([make_trace("a", 3), None]) is None
    with pytest.raises(ValueError, match="captured alike"):
        Trace.join([])
    other = make_trace("b", 2)
    with pytest.raises(ValueError, match="captured alike"):
        Trace.join([make_trace("a", 3), Trace("b", other.stats[:, :1], *make_rows(2)[1].T)])


def test_incomplete_traces_are_none_and_counted(receiver, sender):
    sender.trace("short", *make_rows(3), 0)
    sender.trace("holes", *make_rows(3), 1)
    assert receiver.get("short", n_tokens=4) is None
    assert receiver.get("holes", n_tokens=3) is None
    assert receiver.counters["missing"] == 2


def test_a_trace_that_never_comes_is_none_in_time_and_counted(receiver):
    start = time.monotonic()
    assert receiver.get("never", timeout=0.2) is None
    assert time.monotonic() - start < 60
    assert receiver.counters["missing"] == 1


def test_a_late_trace_is_counted_and_not_kept(receiver, sender):
    assert receiver.get("a", timeout=0.05) is None
    sender.trace("a", *make_rows(3), 0)
    wait_for(receiver, "late", 1)
    assert receiver.get("a", timeout=0.05) is None
    assert not receiver._held


def test_a_late_trace_is_not_taken_for_that_of_a_later_request(receiver, sender):
    """Keys are meant to be unique; where one is used again, a trace that was given up must not
    pass for the next request's."""
    late, own = make_rows(3, seed=1), make_rows(3, seed=2)
    assert receiver.get("a", timeout=0.05) is None
    timer = threading.Timer(0.1, sender.trace, ("a", *late, 0))
    timer.start()
    assert receiver.get("a", timeout=0.3, n_tokens=3) is None
    timer.join()
    sender.trace("a", *own, 0)
    sender.trace("b", *own, 0)
    assert np.array_equal(receiver.get("b").stats, own[0])
    start = time.monotonic()
    assert receiver.get("a", timeout=60) is None
    assert time.monotonic() - start < 30  # there is nothing to wait for
    assert receiver.counters["late"] == 1
    assert receiver.counters["missing"] == 3


def test_a_trace_nobody_will_ask_for_is_not_kept(receiver, sender):
    sender.trace("before", *make_rows(2), 0)
    wait_for(receiver, "received", 1)
    receiver.give_up("before")
    receiver.give_up("after")
    sender.trace("after", *make_rows(2), 0)
    sender.trace("next", *make_rows(2), 0)
    assert receiver.get("next") is not None
    assert not receiver._held and receiver._held_bytes == 0
    assert receiver.counters["late"] == receiver.counters["missing"] == 0


def test_many_waiters_each_get_their_own_trace(receiver, sender):
    async def collect():
        keys = [f"k{i}" for i in range(50)]
        waits = [asyncio.ensure_future(receiver.aget(key, 5.0)) for key in keys]
        await asyncio.sleep(0)
        for i in reversed(range(50)):
            sender.trace(f"k{i}", *make_rows(i + 1, seed=i), 0)
        return await asyncio.gather(*waits)

    traces = asyncio.run(collect())
    assert [len(trace.stats) for trace in traces] == list(range(1, 51))
    assert all(np.array_equal(t.stats, make_rows(i + 1, i)[0]) for i, t in enumerate(traces))


def test_a_waiter_that_is_cancelled_leaves_no_entry(receiver, sender):
    async def cancel():
        wait = asyncio.ensure_future(receiver.aget("a", 60.0))
        await asyncio.sleep(0.05)
        wait.cancel()
        with pytest.raises(asyncio.CancelledError):
            await wait
        assert await receiver.aget("b", timeout=0.05) is None

    asyncio.run(cancel())
    sender.trace("a", *make_rows(2), 0)
    wait_for(receiver, "late", 1)
    assert not receiver._waiting and not receiver._held


def test_a_blocking_waiter_is_woken_by_the_arrival(receiver, sender):
    timer = threading.Timer(0.2, sender.trace, ("a", *make_rows(2), 0))
    timer.start()
    start = time.monotonic()
    assert receiver.get("a", timeout=120) is not None
    assert time.monotonic() - start < 60


def test_a_wrong_token_is_rejected_and_counted(receiver, sender):
    stranger = make_sender("0" * 32)
    stranger.trace("a", *make_rows(2), 0)
    wait_for(receiver, "rejected", 2)
    assert receiver.get("a", timeout=0.05) is None
    assert receiver.counters["received"] == 0
    stranger.close()


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (2, 2, 1)},
        {"shape": (3, 2, 1, N_FEATURES)},
        {"shape": (-2, 2, 1, N_FEATURES)},
        {"shape": (2**63, 2, 1, N_FEATURES)},
        {"wire": "pickle"},
        {"part": Part(2, 2, (0, 1), ((1,), (1,)), True)},
        {"part": Part(0, 2, (0,), ((1,),), True)},
        {"part": Part(0, 2, (0, 10**9), ((1,), (1,)), True)},
        {"part": Part(0, 2, (0, 1), ((1, 1), (1, 1)), True)},
    ],
)
def test_malformed_messages_are_rejected_and_the_next_is_served(receiver, sender, change):
    stats, tokens = make_rows(2)
    header = Header(os.environ[ENV_TOKEN], "trace", "a", stats.shape)
    broken = msgspec.structs.replace(header, **change)
    socket = zmq.Context.instance().socket(zmq.PUSH)
    socket.connect(os.environ[ENV_ENDPOINT])
    socket.send_multipart([msgspec.msgpack.encode(broken), stats.tobytes(), tokens.tobytes()])
    socket.send(b"\xc1 not msgpack")
    socket.send(b"")
    wait_for(receiver, "rejected", 3)
    sender.trace("b", stats, tokens, 0)
    assert receiver.get("b") is not None
    socket.close()


def test_traces_nobody_collects_are_capped_oldest_first_and_counted():
    stats, tokens = make_rows(10)
    room = 3 * (stats.nbytes + tokens.nbytes)
    with Receiver(CaptureConfig(), max_bytes=room) as receiver:
        sender = make_sender()
        for i in range(10):
            sender.trace(f"k{i}", stats, tokens, 0)
        wait_for(receiver, "received", 10)
        assert receiver.counters["dropped"] == 7
        assert list(receiver._held) == ["k7", "k8", "k9"]
        assert all(receiver.get(f"k{i}") is not None for i in (7, 8, 9))
        assert receiver._held_bytes == 0
        sender.close()


def test_a_dropped_trace_is_none_at_once_and_told_once(caplog):
    stats, tokens = make_rows(10)
    with Receiver(CaptureConfig(), max_bytes=stats.nbytes + tokens.nbytes) as receiver:
        sender = make_sender()
        for i in range(9):
            sender.trace(f"k{i}", stats, tokens, 0)
        wait_for(receiver, "received", 9)
        start = time.monotonic()
        assert [receiver.get(f"k{i}", timeout=30) for i in range(8)] == [None] * 8
        assert time.monotonic() - start < 15
        assert receiver.get("k8") is not None
        assert receiver.counters["dropped"] == receiver.counters["missing"] == 8
        assert [r.levelname for r in caplog.records].count("WARNING") == 1
        assert not receiver._held and receiver._held_bytes == 0
        sender.close()


def test_who_waits_for_a_trace_that_is_dropped_waits_no_longer():
    stats, tokens = make_rows(10)
    with Receiver(CaptureConfig(), max_bytes=stats.nbytes + tokens.nbytes) as receiver:
        first, second = make_workers()
        first.trace("a", stats, tokens, 0)
        timer = threading.Timer(0.2, first.trace, ("b", stats, tokens, 0))
        timer.start()
        start = time.monotonic()
        assert receiver.get("a", timeout=30) is None
        assert time.monotonic() - start < 15
        assert receiver.counters["dropped"] == 1
        second.trace("a", stats, tokens, 0)
        # Whole and without a waiter it would be more than the receiver holds.
        threading.Timer(0.2, second.trace, ("b", stats, tokens, 0)).start()
        assert receiver.get("b", timeout=30) is not None
        assert "a" not in receiver._held
        first.close()
        second.close()


def test_a_receiver_without_a_bound_drops_nothing(monkeypatch):
    stats, tokens = make_rows(2000)
    monkeypatch.setattr(Receiver.__init__, "__defaults__", (stats.nbytes,))
    with Receiver(CaptureConfig(), max_bytes=None) as receiver:
        sender = make_sender()
        for i in range(20):
            sender.trace(f"k{i}", stats, tokens, 0)
        wait_for(receiver, "received", 20)
        assert all(receiver.get(f"k{i}") is not None for i in range(20))
        assert receiver.counters["dropped"] == 0
        sender.close()


def test_ten_thousand_traces_leave_no_entry_behind(receiver, sender):
    stats, tokens = make_rows(1)
    for start in range(0, 10_000, 500):
        for i in range(start, start + 500):
            sender.trace(str(i), stats, tokens, 0)
        for i in range(start, start + 500):
            assert receiver.get(str(i), 10.0) is not None
    assert not receiver._held and not receiver._waiting and not receiver._given_up
    assert receiver._held_bytes == 0


def test_a_sender_without_a_receiver_never_blocks_and_counts_what_it_loses():
    sender = Sender("ipc:///nonexistent-pivottrace-endpoint", "token")
    with pytest.raises(RuntimeError, match="nobody received its traces"):
        sender.hello({}, timeout=0.05)
    start = time.monotonic()
    for i in range(20):
        sender.trace(str(i), *make_rows(1), 0)
    assert time.monotonic() - start < 60
    assert sender.lost == 20
    sender.close()


def test_a_full_queue_loses_traces_and_tells_how_many(receiver, monkeypatch):
    monkeypatch.setattr("pivottrace_verl.attention.sender.QUEUE", 4)
    sender = make_sender()
    assert receiver.wait_ready(5)
    stats, tokens = make_rows(2000)
    with receiver._lock:  # the receiver stands still
        start = time.monotonic()
        sent = 0
        while not sender.lost and time.monotonic() - start < 60:
            sender.trace(f"k{sent}", stats, tokens, 0)
            sent += 1
        lost = sender.lost
    assert lost == 1
    assert receiver.get(f"k{sent - 1}", timeout=0.2) is None
    traces = [receiver.get(f"k{i}", 10.0) for i in range(sent - 1)]
    assert all(np.array_equal(trace.stats, stats) for trace in traces)
    sender.trace("next", stats, tokens, 0)
    assert receiver.get("next", 10.0) is not None
    assert receiver.counters["lost"] == 1
    assert receiver.counters["missing"] == 1
    sender.close()


def test_the_environment_is_set_while_a_receiver_listens_and_clean_afterwards():
    names = (ENV_CAPTURE, ENV_ENDPOINT, ENV_TOKEN)
    receiver = Receiver(CaptureConfig(window=8))
    receiver.start()
    assert CaptureConfig.from_json(os.environ[ENV_CAPTURE]).window == 8
    assert len(os.environ[ENV_TOKEN]) == 32
    address = os.environ[ENV_ENDPOINT].removeprefix("ipc://")
    assert os.stat(os.path.dirname(address)).st_mode & 0o077 == 0
    receiver.close()
    receiver.close()
    assert not any(name in os.environ for name in names)
    assert not os.path.exists(os.path.dirname(address))


def test_plugins_that_vllm_loaded_before_learn_that_capture_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(channel, "register_vllm", lambda: asked.append(os.environ[ENV_CAPTURE]))
    for calls in (0, 1):
        monkeypatch.setitem(plugin.STATE["vllm"], "calls", calls)
        with Receiver(CaptureConfig(window=8)):
            assert len(asked) == calls
    assert CaptureConfig.from_json(asked[0]).window == 8


def test_an_engine_that_never_reports_is_told_in_a_sentence(receiver):
    with pytest.raises(RuntimeError, match="No vLLM worker reported"):
        receiver.wait_ready(timeout=0.05)
    sender = make_sender()
    assert receiver.wait_ready(timeout=5)["backend"] == "CPU_ATTN"
    sender.close()


def test_two_waiters_for_one_key_are_refused(receiver):
    receiver._claim("a")
    with pytest.raises(RuntimeError, match="waited for already"):
        receiver.get("a", timeout=0.1)


def make_workers():
    """Two tensor ranks of 3 and 1 heads; the first has the token statistics."""
    first = Part(0, 2, (0, 1), ((3,), (3,)), True)
    second = Part(1, 2, (0, 1), ((1,), (1,)), False)
    return make_sender(part=first), make_sender(part=second)


def test_the_parts_of_several_workers_make_one_trace(receiver):
    first, second = make_workers()
    a, b = make_rows(5, seed=1), make_rows(6, seed=2)
    second.trace("a", *b, 0)
    timer = threading.Timer(0.1, first.trace, ("a", *a, 0))
    timer.start()
    trace = receiver.get("a", n_tokens=5)
    assert np.allclose(trace.stats, (3 * a[0] + b[0][:5]) / 4, atol=1e-6)
    assert np.array_equal(trace.token_entropy, a[1][:, 0])
    assert receiver.counters["received"] == 1
    assert not receiver._held and not receiver._waiting and receiver._held_bytes == 0
    first.close()
    second.close()


def test_a_part_that_does_not_arrive_makes_the_trace_missing_never_half(receiver):
    first, second = make_workers()
    first.trace("a", *make_rows(5), 0)
    assert receiver.get("a", timeout=0.3) is None
    assert receiver.counters["missing"] == 1
    assert receiver.counters["received"] == 0
    second.trace("a", *make_rows(5), 0)
    first.trace("b", *make_rows(2), 0)
    second.trace("b", *make_rows(2), 1)
    assert receiver.get("b", n_tokens=2) is None  # a row was missing on one worker
    wait_for(receiver, "late", 0)
    assert not receiver._held and receiver._held_bytes == 0
    first.close()
    second.close()


def test_parts_nobody_collects_are_capped_too(monkeypatch):
    stats, tokens = make_rows(10)
    with Receiver(CaptureConfig(), max_bytes=3 * (stats.nbytes + tokens.nbytes)) as receiver:
        first, second = make_workers()
        for i in range(10):
            first.trace(f"k{i}", stats, tokens, 0)
        wait_for(receiver, "dropped", 7)
        assert list(receiver._held) == ["k7", "k8", "k9"]
        first.close()
        second.close()


def test_an_engine_is_ready_when_all_its_workers_are(receiver):
    workers = [make_sender(part=Part(0, 2, (), (), True))]
    with pytest.raises(RuntimeError, match="Only 1 vLLM workers reported"):
        receiver.wait_ready(timeout=0.2)
    workers.append(make_sender(part=Part(1, 2, (0,), ((1,),), False)))
    assert receiver.wait_ready(timeout=5)
    with pytest.raises(RuntimeError, match="Only 2 vLLM workers reported"):
        receiver.wait_ready(timeout=0.2, engines=2)
    for worker in workers:
        worker.close()


def test_data_parallel_engines_share_one_receiver(receiver):
    workers = [make_sender() for _ in range(2)]
    assert receiver.wait_ready(timeout=5, engines=2)
    rows = [make_rows(3, seed) for seed in range(20)]
    for i, one in enumerate(rows):
        workers[i % 2].trace(f"k{i}", *one, 0)
    for i, (stats, _) in enumerate(rows):
        assert np.array_equal(receiver.get(f"k{i}").stats, stats)
    for worker in workers:
        worker.lost = 2
        worker.trace("a", *make_rows(1), 0)
        assert receiver.get("a") is not None
        worker.close()
    assert receiver.counters["lost"] == 4


WORKER = """
import os, sys, time
import numpy as np
from pivottrace_verl.attention.parts import Part
from pivottrace_verl.attention.sender import Sender
part = Part(int(sys.argv[1]), 2, (0, 1), ((1,), (1,)), sys.argv[1] == "0")
sender = Sender(os.environ["PIVOTTRACE_ENDPOINT"], os.environ["PIVOTTRACE_TOKEN"], part=part)
sender.hello({})
for key in sys.argv[2:]:
    sender.trace(key, np.ones((3, 2, 1, 25)), np.ones((3, 2)), 0)
print("sent", flush=True)
time.sleep(60)
"""


def test_a_worker_that_dies_costs_its_traces_and_no_more(receiver):
    children = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, *arguments], stdout=subprocess.PIPE, text=True
        )
        for arguments in (["0", "a", "b"], ["1", "a"])
    ]
    try:
        assert [child.stdout.readline() for child in children] == ["sent\n"] * 2
        assert receiver.get("a", timeout=10, n_tokens=3) is not None
        children[1].send_signal(signal.SIGKILL)
        children[1].wait()
        start = time.monotonic()
        assert receiver.get("b", timeout=0.3, n_tokens=3) is None
        assert time.monotonic() - start < 30
        assert receiver.counters["missing"] == 1
        # Another engine's worker is served as before.
        survivor = make_sender()
        survivor.trace("c", *make_rows(3), 0)
        assert receiver.get("c", timeout=10) is not None
        survivor.close()
    finally:
        for child in children:
            child.kill()
            child.wait()


def test_traces_for_a_receiver_that_is_gone_are_lost_not_queued_nor_given_to_its_successor():
    old = Receiver(CaptureConfig())
    old.start()
    sender = make_sender()
    assert old.wait_ready(5)
    old.close()
    with Receiver(CaptureConfig()) as new:
        end = time.monotonic() + 30
        while not sender.lost and time.monotonic() < end:
            sender.trace("a", *make_rows(3), 0)
            time.sleep(0.01)
        before = sender.lost
        for _ in range(100):
            sender.trace("a", *make_rows(3), 0)
        assert sender.lost == before + 100
        assert new.get("a", timeout=0.1) is None
        fresh = make_sender()
        fresh.trace("b", *make_rows(3), 0)
        assert new.get("b", timeout=5) is not None
        assert new.counters["rejected"] == 0
        fresh.close()
    sender.close()
