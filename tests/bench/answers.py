"""What answers cost: votes and rewards of a batch, labels by the hundred thousand.

    python tests/bench/answers.py --out tests/bench/results/answers.json

`vote_ms` and `reward_ms` are for 64 prompts x 16 rollouts; `verifier_ms` is the part spent waiting
for math-verify in the worker processes, `waits` how often. `ours_ms` is the processor time of all
else: of the same batch once more, with the workers' replies at hand. `ours_between_waits_ms` is
that of the run that waited: after a sleep, code and data have to come back into the processor's
caches, which costs more than the work, and the same if nothing is compared meanwhile. `labels` are
canonical forms of distinct labels. Median of the repeats; no answer is known beforehand in any of
them. What else the agent loop does for a rollout, `tests.bench.group_hook` measures.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from pivottrace_verl import answer_pool
from pivottrace_verl.answer_kinds import _canonical_expression
from pivottrace_verl.answer_math import MathAnswers
from pivottrace_verl.answer_numbers import read_number
from pivottrace_verl.answers import canonical_many, extract_many, get_answers
from pivottrace_verl.files import write_json_atomic
from pivottrace_verl.training.groups import VotePolicy, judge

PROMPTS, ROLLOUTS, REPEATS = 64, 16, 3


class Clock:
    """Stands before the workers: times the waits for them, and can give their replies again."""

    def __init__(self) -> None:
        self._ask = answer_pool.ask
        self._replies: list[list] = []
        self.reset()

    def reset(self) -> None:
        self._replies, self._again = [], False
        self._begin()

    def again(self) -> None:
        """From here on the replies since the reset come once more, at once."""
        self._again = True
        self._replies.reverse()
        self._begin()

    def _begin(self) -> None:
        self.waited = self.asking = 0.0
        self.waits = 0
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float, float, int]:
        """Seconds in all, waiting for the workers, and of processor time of ours; waits."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return wall, self.waited, cpu - self.asking, self.waits

    def __call__(self, kind: str, operation: str, items: list, about: Sequence[str] = ()) -> list:
        wall, cpu = time.perf_counter(), time.process_time()
        if self._again:
            values = self._replies.pop()
        else:
            values = self._ask(kind, operation, items, about)
            self._replies.append(values)
        self.waited += time.perf_counter() - wall
        self.asking += time.process_time() - cpu
        self.waits += 1
        return values


Run = tuple[float, float, float, int, float]


def forget() -> None:
    """No answer is known any more."""
    get_answers.cache_clear()
    read_number.cache_clear()
    _canonical_expression.cache_clear()


def twice(clock: Clock, work: Callable[[], None]) -> Run:
    """Some work with the workers, and with their replies at hand; nothing is known before either.
    The latter's own processor time comes last."""
    forget()
    clock.reset()
    work()
    first = clock.read()
    forget()
    clock.again()
    work()
    ours = clock.read()[2]
    clock.reset()
    return *first, ours


def number(rng: random.Random, prompt: int) -> str:
    value = prompt * 100 + min(int(rng.expovariate(0.5)), 9)
    return rng.choice([f"{value}", f"{value}.0", rf"\frac{{{2 * value}}}{{2}}"])


def formula(rng: random.Random, prompt: int) -> str:
    value = prompt * 100 + min(int(rng.expovariate(0.5)), 5)
    return rng.choice([rf"{value}\sqrt{{x}}", rf"\sqrt{{x}}\cdot {value}"])


def arithmetic(rng: random.Random, prompt: int) -> str:
    a, b, c = prompt, rng.randint(1, 3), rng.randint(1, 3)
    return rng.choice([f"{a}*({b}+{c})", f"({c}+{b})*{a}"])


def vote(name: str, write, rng: random.Random, clock: Clock) -> dict[str, float]:
    """Rewards by vote and by label of a batch whose answers are already read."""
    runs = []
    for _ in range(REPEATS):
        groups = [[write(rng, p) for _ in range(ROLLOUTS)] for p in range(PROMPTS)]

        def work(groups: list[list[str]] = groups) -> None:
            kind = get_answers(name)
            for group in groups:
                judge(group, [0.0] * ROLLOUTS, labeled=False, kind=kind, policy=VotePolicy())

        runs.append(twice(clock, work))
    return cost("vote", runs)


def reward(write, rng: random.Random, clock: Clock) -> dict[str, float]:
    """Extraction from the text and comparison with the label, a rollout at a time, as verl asks."""
    from pivottrace_verl.training.reward import compute_score

    runs = []
    for _ in range(REPEATS):
        texts = [
            (f"We add. {'So it goes on. ' * 40}It is \\boxed{{{write(rng, p)}}}.", write(rng, p))
            for p in range(PROMPTS)
            for _ in range(ROLLOUTS)
        ]

        def work(texts: list[tuple[str, str]] = texts) -> None:
            for text, label in texts:
                compute_score("bench", text, label)

        runs.append(twice(clock, work))
    return cost("reward", runs)


def cost(what: str, runs: list[Run]) -> dict[str, float]:
    """The median of each figure."""
    wall, waited, between, waits, ours = (
        statistics.median(column) for column in zip(*runs, strict=True)
    )
    seconds = {
        f"{what}_ms": wall,
        "verifier_ms": waited,
        "ours_ms": ours,
        "ours_between_waits_ms": between,
    }
    return {**{name: round(s * 1000, 2) for name, s in seconds.items()}, "waits": waits}


def labels(n: int, share: float, rng: random.Random) -> dict[str, float]:
    """Canonical forms of `n` distinct labels, of which a share are formulas."""
    made = [rf"{i}\sqrt{{x+{i}}}" if rng.random() < share else str(i) for i in range(n)]
    start = time.perf_counter()
    forms = canonical_many(MathAnswers(), made)
    seconds = time.perf_counter() - start
    assert all(isinstance(form, str) for form in forms)
    return {"n": n, "formulas": share, "seconds": round(seconds, 2), "per_s": round(n / seconds)}


def texts(n: int, rng: random.Random) -> dict[str, float]:
    """Answers of `n` rollouts' texts, half of them formulas."""
    made = [
        f"{'So it goes on. ' * 100}\\boxed{{{rng.choice([formula, number])(rng, i)}}}."
        for i in range(n)
    ]
    start = time.perf_counter()
    extract_many(MathAnswers(), made)
    seconds = time.perf_counter() - start
    return {"n": n, "seconds": round(seconds, 2), "per_s": round(n / seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    parser.add_argument("--labels", type=int, default=100_000)
    args = parser.parse_args()
    rng = random.Random(0)
    clock = Clock()
    answer_pool.ask("math", "equal", [("x", "y")] * 200)  # the workers' start is not measured
    answer_pool.ask = clock
    result = {
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
        "versions": {"math-verify": version("math-verify"), "sympy": version("sympy")},
        "workers": answer_pool.Limits.from_environment().workers,
        "prompts": PROMPTS,
        "rollouts": ROLLOUTS,
        "vote": {
            "exact": vote("exact", number, rng, clock),
            "expression": vote("expression", arithmetic, rng, clock),
            "math, numbers": vote("math", number, rng, clock),
            "math, formulas": vote("math", formula, rng, clock),
        },
        "reward": {
            "math, numbers": reward(number, rng, clock),
            "math, formulas": reward(formula, rng, clock),
        },
        "labels": [
            labels(args.labels, 0.0, rng),
            labels(args.labels, 0.1, rng),
            labels(args.labels // 20, 1.0, rng),
        ],
        "texts": texts(args.labels // 20, rng),
    }
    if args.out:
        write_json_atomic(args.out, result)
    json.dump(result, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
