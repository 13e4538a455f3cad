"""A training whose processes die ends with a sentence, whatever the trainer waits for."""

import asyncio
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pivottrace_verl.errors import PivotTraceError

ray = pytest.importorskip("ray")
watch = pytest.importorskip("pivottrace_verl.training.watch")


@pytest.fixture(scope="module")
def worker_class() -> Iterator[Any]:
    with tempfile.TemporaryDirectory(prefix="pt", dir="/tmp") as folder:
        ray.init(num_cpus=8, include_dashboard=False, _temp_dir=folder, logging_level="error")

        @ray.remote
        class Worker:
            """An async actor, as agent-loop workers are."""

            async def pid(self) -> int:
                return os.getpid()

            async def forever(self) -> None:
                await asyncio.Event().wait()

            async def watch(self) -> None:
                await asyncio.sleep(1.0)
                raise PivotTraceError("The answers of rollout 3 cannot be compared.")

        yield Worker
        ray.shutdown()


def sleep() -> None:
    time.sleep(120)


def poll() -> None:
    while True:
        time.sleep(0.05)


def wait_in_a_loop(reference: Any) -> None:
    """As verl's checkpoint manager does: a coroutine that blocks in `ray.get`."""

    async def blocked() -> None:
        ray.get(reference)

    asyncio.run(blocked())


WAITS: dict[str, Callable[[Any], None]] = {
    "sleeps": lambda _: sleep(),
    "polls": lambda _: poll(),
    "waits for another process": lambda other: ray.get(other.forever.remote()),
    "waits in a coroutine": lambda other: wait_in_a_loop(other.forever.remote()),
}


@pytest.mark.parametrize("wait", list(WAITS))
def test_a_process_that_is_killed_ends_whatever_the_main_thread_waits_for(
    worker_class: Any, wait: str
) -> None:
    dies, lives = worker_class.remote(), worker_class.remote()
    pid = ray.get(dies.pid.remote())
    signs = {
        "agent-loop worker 0": lives.__ray_ready__.remote,
        "agent-loop worker 1": dies.__ray_ready__.remote,
    }
    killer = threading.Timer(3.0, os.kill, (pid, signal.SIGKILL))
    start = time.monotonic()
    before = signal.getsignal(signal.SIGINT)
    # As in the main thread of Ray's workers.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    said = r"The agent-loop worker 1 died\. Rollouts were lost"
    with pytest.raises(PivotTraceError, match=said), watch.Watch(signs):
        killer.start()
        WAITS[wait](lives)
    assert time.monotonic() - start < 30
    assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    assert signal.getsignal(signal.SIGINT) is before


def test_what_a_process_says_itself_is_the_sentence(worker_class: Any) -> None:
    worker = worker_class.remote()
    signs, said = {"agent-loop worker 0": worker.watch.remote}, r"^The answers .* be compared\.$"
    with pytest.raises(PivotTraceError, match=said), watch.Watch(signs):
        sleep()


def test_what_is_refused_just_before_the_end_is_not_missed(worker_class: Any) -> None:
    worker = worker_class.remote()
    refused = worker.watch.remote()
    ray.wait([refused])
    signs, said = {"agent-loop worker 0": lambda: refused}, "cannot be compared"
    with pytest.raises(PivotTraceError, match=said), watch.Watch(signs):
        pass


def test_an_interruption_never_reaches_what_comes_after_the_block(
    worker_class: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_class.remote()
    refused = worker.watch.remote()
    ray.wait([refused])
    about_to, kill = threading.Event(), signal.pthread_kill

    def slowly(thread: int, number: int) -> None:
        about_to.set()
        time.sleep(0.5)
        kill(thread, number)

    monkeypatch.setattr(signal, "pthread_kill", slowly)
    signs, said = {"agent-loop worker 0": lambda: refused}, "cannot be compared"
    with pytest.raises(PivotTraceError, match=said), watch.Watch(signs):
        about_to.wait(10)
    time.sleep(1.0)


def test_an_interruption_never_comes_before_the_block(
    worker_class: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_class.remote()
    refused = worker.watch.remote()
    ray.wait([refused])
    sent, kill = threading.Event(), signal.pthread_kill

    def noted(thread: int, number: int) -> None:
        kill(thread, number)
        sent.set()

    monkeypatch.setattr(signal, "pthread_kill", noted)
    watching = watch.Watch({"agent-loop worker 0": lambda: refused})
    start = watching._thread.start
    watching._thread.start = lambda: (start(), sent.wait(10))
    entered = False
    with pytest.raises(PivotTraceError, match="cannot be compared"), watching:
        entered = True
        sleep()
    assert entered


def test_an_error_that_the_dead_process_caused_becomes_the_same_sentence(
    worker_class: Any,
) -> None:
    dies = worker_class.remote()
    pid = ray.get(dies.pid.remote())
    signs, said = {"reward worker 0": dies.__ray_ready__.remote}, r"The reward worker 0 died\."
    with pytest.raises(PivotTraceError, match=said) as caught, watch.Watch(signs):
        os.kill(pid, signal.SIGKILL)
        ray.get(dies.forever.remote())
    assert isinstance(caught.value.__cause__, ray.exceptions.RayActorError)


def test_other_errors_and_the_end_pass_through(worker_class: Any) -> None:
    lives = worker_class.remote()
    signs = {"agent-loop worker 0": lives.__ray_ready__.remote}
    with watch.Watch(signs):
        time.sleep(2 * watch.POLL_S)
    with pytest.raises(ZeroDivisionError), watch.Watch(signs):
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), watch.Watch(signs):
        raise KeyboardInterrupt


def test_patience_ends_when_nothing_changes_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    patience, without = watch.Patience(10), watch.Patience(None)
    for now[0], state in ((0.0, "a"), (9.0, "a"), (12.0, "b"), (21.0, "b")):
        patience.look(state)
    now[0] = 23.0
    with pytest.raises(
        PivotTraceError, match=r"finished in 10 s, so training stops; .* raise pivo"
    ):
        patience.look("b")
    for now[0] in (0.0, 1e9):
        without.look("a")
