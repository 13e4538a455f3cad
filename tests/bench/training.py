"""What our own work costs in a training step: votes and rewards, the curriculum, re-triage.

    python -m tests.bench.training --out FILE.json [--prompts 1000000] [--steps 200]

`vote` is for 64 prompts x 16 rollouts; `ours_ms` is the processor time besides the verifier.
`steering` is a pool of so many prompts, 64 prompts x 16 rollouts a step, no verl: what is drawn,
dressed, observed and measured a step, and, apart, re-triage, which comes once in `every` steps.
Wall time and, for a busy machine, processor time; peak memory of the whole process.

Axes: P prompts.
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pivottrace_verl import answer_pool
from pivottrace_verl.calibration import Outcome
from pivottrace_verl.curriculum import ORDERS, Items
from pivottrace_verl.files import write_json_atomic
from pivottrace_verl.observed import observed
from pivottrace_verl.plan import TriageConfig
from pivottrace_verl.retriage import Retriage, RetriageConfig
from pivottrace_verl.training.steering import Steering, SteeringConfig
from tests.bench.answers import Clock, number, vote
from tests.step_records import record as step_record

PROMPTS, ROLLOUTS, PROBES = 64, 16, 1000
LIMITS = {"vote_ms": 50.0, "step_ms": 50.0, "peak_gib": 1.0}


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Wall and processor milliseconds."""
    start = time.perf_counter(), time.process_time()
    work()
    return 1e3 * (time.perf_counter() - start[0]), 1e3 * (time.process_time() - start[1])


def summary(runs: list[tuple[float, float]]) -> dict[str, float]:
    wall, cpu = zip(*runs, strict=True)
    return {
        "median_ms": round(statistics.median(wall), 2),
        "max_ms": round(max(wall), 2),
        "median_cpu_ms": round(statistics.median(cpu), 2),
        "max_cpu_ms": round(max(cpu), 2),
    }


def make(n: int, order: str) -> tuple[Steering, Retriage, list[str]]:
    """Steering of a pool whose probes go wrong where it is uncertain; three in ten are labelled."""
    rng = np.random.default_rng(n)
    text = rng.bytes(8 * n).hex()
    ids = [text[i : i + 16] for i in range(0, 16 * n, 16)]
    u = rng.random(n)
    route = np.where(u > 0.7, "annotate", "self_train")
    block: dict[str, Any] = {
        "run": None, "vote": {}, "weights": {"policy": "measured"}, "guard": {}, "retriage": {},
        "curriculum": {"order": order}, "rollouts": {"annotate": None, "self_train": None},
    }  # fmt: skip
    labelled = [pt_id for pt_id, hard in zip(ids, u > 0.7, strict=True) if hard]
    items = Items.of(np.arange(n), ids, route, u)
    steering = Steering(items, labelled, SteeringConfig.of(block, PROMPTS, ROLLOUTS), lambda r: [])
    zero = pa.array(np.zeros(n, dtype=np.int64))
    pool = pa.table(
        {
            "pt_id": items.pt_id.tolist(),
            "n_rollouts": pa.array(np.full(n, ROLLOUTS)),
            "truncated": zero,
            "unparseable": zero,
            "timed_out": zero,
            "uncertainty/pivot_density": pa.array(u),
            "cost": pa.array(np.ones(n)),
            "data_source": pa.repeat("bench", n),
        }
    )
    probes = [Outcome(ids[i], 1 - u[i], bool(u[i] < 0.5)) for i in range(min(PROBES, n))]
    settings = TriageConfig(
        estimator="pivot_density", direction="higher", budget=int(0.4 * n), overflow="self_train"
    )
    return steering, Retriage(pool, n, probes, settings, RetriageConfig(enable=True)), labelled


def row(pt_id: str, labeled: bool) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": "?"}],
        "data_source": "bench",
        "reward_model": {"style": "rule", "ground_truth": "7" if labeled else None},
        "extra_info": {"pt_id": pt_id, "labeled": labeled, "route": "?", "uncertainty": 0.5},
    }


def record(pt_id: str, route: str, rng: random.Random) -> dict[str, Any]:
    return step_record(
        pt_id, route == "annotate", reward=float(rng.random() < 0.5), agreement=0.5, n_tokens=900,
        pivots=20, pivot_density=rng.random(), entropy=0.4, logprob=-0.4, vote_s=0.0,
    )  # fmt: skip


def steering(n: int, steps: int, order: str) -> dict[str, Any]:
    """One pool through `steps` steps."""
    rng = random.Random(0)
    steer, retriage, labelled = make(n, order)
    known, pt_ids = set(labelled), steer.curriculum._items.pt_id
    work: list[tuple[float, float]] = []
    for step in range(1, steps + 1):
        dressed: list[dict[str, Any]] = []

        def draw(step: int = step, dressed: list[dict[str, Any]] = dressed) -> None:
            steer.begin(step)
            for _ in range(PROMPTS):
                pt_id = str(pt_ids[next(steer.curriculum)])
                dressed.append(steer.dress(row(pt_id, pt_id in known)))

        first = timed(draw)
        records = [
            (str(key), record(info["pt_id"], info["route"], rng))
            for key, info in enumerate(one["extra_info"] for one in dressed)
            for _ in range(ROLLOUTS)
        ]

        def learn(step: int = step, records: Any = records) -> None:
            steer.weights(step)
            steer.end(step, records)
            retriage.observe(step, observed(records))

        second = timed(learn)
        work.append((first[0] + second[0], first[1] + second[1]))

    def move() -> None:
        moves = retriage.move(labelled, float(len(labelled)))
        assert moves.refused is None, moves.refused
        steer.curriculum.update(
            annotate=moves.annotate, resting=moves.resting, uncertainty=moves.uncertainty
        )

    moving = [timed(move) for _ in range(3)]
    state: list[Any] = []
    saving = [timed(lambda: state.append((steer.state_dict(), retriage.state_dict())))]
    every = RetriageConfig().every
    wall, cpu = (
        statistics.median(run[k] for run in work) + statistics.median(m[k] for m in moving) / every
        for k in (0, 1)
    )
    return {
        "order": order,
        "step": summary(work),
        "new_pass": summary([timed(steer.curriculum._lay_out) for _ in range(3)]),
        "retriage": summary(moving),
        "every": every,
        "step_with_its_share_of_retriage": {"ms": round(wall, 2), "cpu_ms": round(cpu, 2)},
        "save_state": summary(saving),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--order", choices=ORDERS, default="mixed")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    pool = steering(options.prompts, options.steps, options.order)
    # The workers of the vote below have memory of their own.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    rng, clock = random.Random(0), Clock()
    answer_pool.ask("math", "equal", [("x", "y")] * 200)  # the workers' start is not measured
    answer_pool.ask = clock
    result = {
        "limits": LIMITS,
        "prompts": options.prompts,
        "steering": pool,
        "peak_gib": round(peak, 3),
        "vote": {
            "exact": vote("exact", number, rng, clock),
            "math, numbers": vote("math", number, rng, clock),
        },
        "machine": {"cores": os.cpu_count(), "python": platform.python_version()},
        "note": f"load average {load:.1f} on {os.cpu_count()} cores at the start",
        "versions": {name: version(name) for name in ("numpy", "pyarrow", "math-verify")},
    }
    write_json_atomic(options.out, result)
    json.dump(result, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
