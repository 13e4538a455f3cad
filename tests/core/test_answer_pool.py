"""Bounded worker processes: nothing hangs, nothing grows, nothing is left behind."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pivottrace_verl import answer_pool
from pivottrace_verl.answer_pool import TIMED_OUT, Limits, ask
from pivottrace_verl.answers import cluster, extract_many, grade_many
from pivottrace_verl.errors import PivotTraceError

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
# What really keeps math-verify or sympy busy for minutes or for ever, each in its own way.
HANG_IN_COMPARISON = [
    r"\sum_{n=1}^{100000000} \frac{1}{n^2}",
    r"(x+1)^{500}(y+z)^{300}",
    r"((10^{1000})^{1000})^{1000}",
    r"10^{9}!",
]
HANG_IN_PARSER = [r"\binom{100000000}{50000000}", "(" * 190 + "1" + ")" * 190]
HANG_IN_EXTRACTION = [r"\boxed{" + "(" * 50_000 + "1" + ")" * 50_000 + "}", r"\( " * 33_000]
LONG_TEXTS = [r"\boxed{" * 14_000, "$" * 100_000, "9" * 100_000, "answer " * 14_000, " [" * 50_000]
TAKES_MEMORY = [r"2^{40000 \cdot 40000}", r"(1+x)^{3000 \cdot 3000}"]
FINE = (r"\sqrt{8}", r"2\sqrt{2}")


@pytest.fixture(autouse=True, scope="module")
def no_worker_left():
    yield
    answer_pool.close()


@pytest.fixture(autouse=True)
def limits():
    usual, pool = Limits(workers=1, seconds=1.0), answer_pool._shared.pool
    if pool is None or pool.limits != usual:
        answer_pool.set_limits(usual)


def workers_of(pid):
    """Process ids of the workers that a process has started."""
    found = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    )
    return [int(line.split()[0]) for line in found.stdout.splitlines() if "answer_worker" in line]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=10.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_what_hangs_is_given_up_at_the_limit_and_only_that():
    ask("math", "equal", [FINE])
    questions = [FINE, *((bomb, "3 x") for bomb in HANG_IN_COMPARISON), FINE]
    values = ask("math", "equal", questions)
    assert values == [True, *[TIMED_OUT] * len(HANG_IN_COMPARISON), True]


def test_a_parser_that_hangs_is_given_up_too():
    assert ask("math", "canonical", HANG_IN_PARSER) == [TIMED_OUT] * len(HANG_IN_PARSER)


def test_texts_of_a_hundred_thousand_characters_are_read_or_given_up():
    found = extract_many("math", [*HANG_IN_EXTRACTION, *LONG_TEXTS])
    assert all(answer is None or answer is TIMED_OUT for answer in found)
    assert found[0] is TIMED_OUT


@pytest.mark.parametrize("answer", TAKES_MEMORY)
def test_an_answer_that_takes_too_much_memory_is_given_up_before_its_time(answer):
    answer_pool.set_limits(Limits(workers=1, seconds=600, memory_mb=24))
    start = time.monotonic()
    values = ask("math", "equal", [(answer, "3 x"), FINE])
    assert values == [TIMED_OUT, True]
    assert time.monotonic() - start < 300


def test_a_worker_never_holds_much_more_than_its_limit():
    answer_pool.set_limits(Limits(workers=1, seconds=30, memory_mb=24))
    ask("math", "equal", [FINE])
    (pid,) = workers_of(os.getpid())
    resident = []
    asked = threading.Thread(target=lambda: ask("math", "equal", [(TAKES_MEMORY[0], "3")]))
    asked.start()
    while asked.is_alive():
        status = Path(f"/proc/{pid}/statm")
        if status.exists():
            resident.append(int((status.read_text().split() or [0, 0])[1]) * 4096)
        time.sleep(0.02)
    assert max(resident) - resident[0] < 4 * 24 * 2**20


def test_a_worker_that_somebody_killed_is_replaced_and_nothing_is_lost():
    ask("math", "equal", [FINE])
    (pid,) = workers_of(os.getpid())
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_running(pid))
    assert ask("math", "equal", [FINE]) == [True]


def test_a_worker_is_used_again():
    ask("math", "equal", [FINE])
    first = workers_of(os.getpid())
    ask("math", "equal", [("x", "y"), FINE])
    assert workers_of(os.getpid()) == first and len(first) == 1


def test_many_threads_get_their_own_replies():
    answer_pool.set_limits(Limits(workers=2, seconds=10))
    questions = [[(f"x+{i}", f"{j}+x") for j in range(20)] for i in range(20)]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda pairs: ask("math", "equal", pairs), questions))
    assert found == [[i == j for j in range(20)] for i in range(20)]
    assert len(workers_of(os.getpid())) <= 2


def test_a_question_that_waits_while_the_limits_change_is_answered():
    bomb = [(HANG_IN_COMPARISON[0], "3")]
    ask("math", "equal", [FINE])
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(ask, "math", "equal", bomb)
        time.sleep(0.3)
        second = threads.submit(ask, "math", "equal", [FINE])
        time.sleep(0.1)
        answer_pool.set_limits(Limits(workers=1, seconds=2.0))
        assert first.result(timeout=60) == [TIMED_OUT]
        assert second.result(timeout=60) == [True]
    wait_until(lambda: workers_of(os.getpid()) == [])


def test_chunks_come_back_in_order_from_several_workers():
    answer_pool.set_limits(Limits(workers=2, seconds=10))
    labels = [f"x+{i}" for i in range(300)]
    assert ask("math", "canonical", labels) == labels


def test_an_event_loop_goes_on_while_an_answer_is_given_up():
    async def run():
        ticks = 0
        waiting = asyncio.create_task(
            asyncio.to_thread(ask, "math", "equal", [(HANG_IN_COMPARISON[0], "3")])
        )
        while not waiting.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks, await waiting

    ticks, values = asyncio.run(run())
    assert values == [TIMED_OUT]
    assert ticks > 20


def script(tmp_path, text):
    path = tmp_path / "script.py"
    path.write_text(text)
    return [sys.executable, str(path)]


BUSY = """
import threading, time
from pivottrace_verl import answer_pool
answer_pool.set_limits(answer_pool.Limits(workers=1, seconds=300))
answer_pool.ask("math", "equal", [("x", "y")])
busy = threading.Thread(
    target=answer_pool.ask, args=("math", "equal", [(r"((10^{1000})^{1000})^{1000}", "3 x")])
)
busy.start()
time.sleep(1)
print("busy", flush=True)
busy.join()
"""


def test_a_busy_worker_ends_with_a_parent_that_is_killed(tmp_path):
    command = script(tmp_path, BUSY)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as parent:
        assert parent.stdout.readline() == "busy\n"
        (pid,) = workers_of(parent.pid)
        assert is_running(pid)
        parent.kill()
    wait_until(lambda: not is_running(pid))


def test_a_script_without_a_main_guard_runs_once_and_leaves_nothing_behind(tmp_path):
    text = (
        "import subprocess, os\n"
        "from pivottrace_verl.answers import get_answers\n"
        "print(get_answers('math').equal('x+1', '1+x'))\n"
        "ps = ['ps', '-o', 'pid=,args=', '--ppid', str(os.getpid())]\n"
        "lines = subprocess.run(ps, capture_output=True, text=True).stdout.splitlines()\n"
        "print(*[line.split()[0] for line in lines if 'answer_worker' in line])\n"
    )
    done = subprocess.run(
        script(tmp_path, text), capture_output=True, text=True, env=ENVIRONMENT, check=True
    )
    same, pid = done.stdout.split()
    assert (same, done.stderr) == ("True", "")
    assert not is_running(int(pid))


def test_a_forked_child_asks_workers_of_its_own(tmp_path):
    text = (
        "import os, sys\n"
        "from pivottrace_verl.answer_pool import ask\n"
        "assert ask('math', 'equal', [('x+1', '1+x')]) == [True]\n"
        "child = os.fork()\n"
        "same = ask('math', 'equal', [('x+2', '2+x'), ('x', 'y')])\n"
        "assert same == [True, False], same\n"
        "if child:\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
        "    print('both')\n"
    )
    done = subprocess.run(
        script(tmp_path, text),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("both\n", 0)


def test_plain_numbers_and_identical_texts_start_no_worker_and_load_no_sympy(tmp_path):
    text = (
        "import sys\n"
        "from pivottrace_verl import answer_pool\n"
        "from pivottrace_verl.answers import cluster, correct, extract_many\n"
        "answers = extract_many('math', [r'\\boxed{1/2}', r'so \\boxed{0.5}', r'\\boxed{1,000}'])\n"
        "assert correct(answers[0], '0.5', 'math') and not correct(answers[2], '10', 'math')\n"
        "assert cluster(answers, 'math').clusters[0][1] == 2\n"
        "assert correct('x^2', 'x^2', 'math')\n"
        "print(answer_pool._shared.pool, 'sympy' in sys.modules)\n"
    )
    done = subprocess.run(
        script(tmp_path, text), capture_output=True, text=True, env=ENVIRONMENT, check=True
    )
    assert done.stdout == "None False\n"


def test_limits_come_from_the_environment_and_bad_ones_are_refused(monkeypatch):
    monkeypatch.setenv("PIVOTTRACE_ANSWER_WORKERS", "3")
    monkeypatch.setenv("PIVOTTRACE_ANSWER_SECONDS", "0.5")
    assert Limits.from_environment() == Limits(workers=3, seconds=0.5)
    monkeypatch.setenv("PIVOTTRACE_ANSWER_SECONDS", "soon")
    with pytest.raises(PivotTraceError, match="PIVOTTRACE_ANSWER_SECONDS is 'soon'"):
        Limits.from_environment()
    for bad in ({"workers": 0}, {"seconds": 0.0}, {"seconds": float("nan")}, {"memory_mb": 0}):
        with pytest.raises(PivotTraceError, match="above zero"):
            Limits(**bad)


OWN = """
import time

class Own:
    def extract(self, text):
        return None if text == "nothing" else self.slow(text)

    def equal(self, a, b):
        return self.slow(a) <= b

    def canonical(self, label):
        return label

    def slow(self, text):
        while text == "hang":
            time.sleep(0.1)
        if text == "large":
            bytearray(2**31)
        return text

class Late(Own):
    def __init__(self):
        time.sleep(1.5)
"""


@pytest.fixture
def own(monkeypatch, tmp_path):
    """Verifiers in a module that no worker has heard of when it starts."""
    ask("math", "equal", [FINE])
    (tmp_path / "own_verifier.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_verifier:Own"


def test_a_verifier_of_ones_own_is_held_to_the_limits_too(own):
    (pid,) = workers_of(os.getpid())
    texts = ["7", "nothing", "hang", "large", "8"]
    assert extract_many(own, texts) == ["7", None, TIMED_OUT, TIMED_OUT, "8"]
    assert not is_running(pid)
    graded = grade_many(own, [("7", "8"), ("9", "8"), ("hang", "8"), (TIMED_OUT, "8"), (None, "8")])
    assert graded == ["right", "wrong", "timed_out", "timed_out", "unparseable"]


def test_a_verifier_that_looks_one_way_only_is_asked_both_ways_in_a_vote(own):
    assert cluster(["7", "8", "7"], own).clusters == [("7", 3)]
    assert cluster(["8", "7"], own).clusters == [("7", 2)]


def test_what_a_verifier_needs_to_load_counts_for_no_limit(own):
    assert extract_many("own_verifier:Late", ["7"]) == ["7"]
