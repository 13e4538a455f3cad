"""The channel loses nothing silently: traces arrive once, whole, to whom they belong."""

import asyncio
import os
import threading
import time

import msgspec
import numpy as np
import pytest
import zmq

from pivottrace_verl.attention.channel import Header, Receiver, Sender, Trace
from pivottrace_verl.attention.config import (
    ENV_CAPTURE,
    ENV_ENDPOINT,
    ENV_TOKEN,
    CaptureConfig,
)

N_FEATURES = 25


@pytest.fixture
def receiver():
    with Receiver(CaptureConfig()) as receiver:
        yield receiver


@pytest.fixture
def sender(receiver):
    sender = Sender(os.environ[ENV_ENDPOINT], os.environ[ENV_TOKEN])
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
    sender = Sender(os.environ[ENV_ENDPOINT], os.environ[ENV_TOKEN], wire="float16")
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
    stranger = Sender(os.environ[ENV_ENDPOINT], "0" * 32)
    stranger.trace("a", *make_rows(2), 0)
    wait_for(receiver, "rejected", 1)
    assert receiver.get("a", timeout=0.05) is None
    assert receiver.counters["received"] == 0
    stranger.close()


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (2, 2, 1)},
        {"shape": (3, 2, 1, N_FEATURES)},
        {"shape": (-2, 2, 1, N_FEATURES)},
        {"wire": "pickle"},
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
        sender = Sender(os.environ[ENV_ENDPOINT], os.environ[ENV_TOKEN])
        for i in range(10):
            sender.trace(f"k{i}", stats, tokens, 0)
        wait_for(receiver, "received", 10)
        assert receiver.counters["dropped"] == 7
        assert list(receiver._held) == ["k7", "k8", "k9"]
        assert all(receiver.get(f"k{i}") is not None for i in (7, 8, 9))
        assert receiver._held_bytes == 0
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


def test_a_sender_without_a_receiver_never_blocks_and_counts_what_it_loses(monkeypatch):
    monkeypatch.setattr("pivottrace_verl.attention.channel.QUEUE", 4)
    sender = Sender("ipc:///nonexistent-pivottrace-endpoint", "token")
    start = time.monotonic()
    for i in range(20):
        sender.trace(str(i), *make_rows(1), 0)
    assert time.monotonic() - start < 60
    assert sender.lost == 16
    sender._socket.close(linger=0)


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


def test_an_engine_that_never_reports_is_told_in_a_sentence(receiver, sender):
    with pytest.raises(RuntimeError, match="No vLLM worker reported"):
        receiver.wait_ready(timeout=0.05)
    sender.hello({"backend": "CPU_ATTN"})
    assert receiver.wait_ready(timeout=5)["backend"] == "CPU_ATTN"


def test_two_waiters_for_one_key_are_refused(receiver):
    receiver._claim("a")
    with pytest.raises(RuntimeError, match="waited for already"):
        receiver.get("a", timeout=0.1)
