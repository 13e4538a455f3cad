"""The guard beside re-triage: prompts that move are no collapse, and hide none."""

import random
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pivottrace_verl.curriculum import Items
from pivottrace_verl.pool import RunDir
from pivottrace_verl.training.steering import Steering, SteeringConfig
from tests.step_records import record
from tests.triaged_run import N, buy, make_run, trained

ROLLOUTS = 8
Policy = Callable[[float, int], tuple[float, float]]
"""(what a prompt's rollouts got right at first, step) -> (chance of a right rollout, chance that a
wrong one gives the prompt's favourite wrong answer)."""


def verdicts(path: Path, policy: Policy, every: int, seed: int, steps: int) -> list[int]:
    """The steps with a verdict, where the labels that re-triage asks for come by and by."""
    run, rng = make_run(path, n=600), random.Random(seed)
    ids, bought = trained(run), set(run.ledger().labels())
    order = [prompt.pt_id for prompt in run.pool()]
    skill = dict(zip(order[:N], np.linspace(1, 0, N), strict=True))
    skill |= dict(zip(order[N:], np.linspace(1, 0, len(order) - N), strict=True))
    steering = steer(run, ids, every, seed)
    found = []
    for step in range(1, steps + 1):
        steering.begin(step)
        records = []
        for key, place in enumerate(islice(steering.curriculum, 32)):
            info = steering.dress(row(ids[place], ids[place] in bought))["extra_info"]
            right, favourite = policy(float(skill[ids[place]]), step)
            records += rollouts(str(key), info, right, favourite, rng)
        _, told = steering.end(step, records)
        found += [step for sentence in told if "agreement of the votes rose" in sentence]
        labels = run.ledger().labels()
        waiting = [i for i in steering.state_dict()["retriage"]["asked"] if i not in labels]
        buy(run, dict.fromkeys(waiting[: len(waiting) // 5 + 1], "1"), "annotate")
    return found


def steer(run: RunDir, ids: list[str], every: int, seed: int) -> Steering:
    block = {
        "run": str(run.path),
        "vote": {},
        "weights": {},
        "guard": {},
        "curriculum": {"seed": seed},
        "retriage": {"enable": True, "every": every, "budget": N + 200},
        "rollouts": {"annotate": None, "self_train": None},
    }
    plan = {r["pt_id"]: r for r in run.plan().to_pylist()}
    route, u = ([plan[i][name] for i in ids] for name in ("route", "uncertainty"))
    items, labels = Items.of(range(len(ids)), ids, route, u), run.ledger().labels()
    pool = {p["pt_id"]: p for p in run.pool_table().to_pylist()}
    return Steering(
        items,
        [i for i in ids if i in labels],
        SteeringConfig.of(block, 32, ROLLOUTS),
        lambda rows: [pool[ids[row]] for row in rows],
    )


def row(pt_id: str, labeled: bool) -> dict[str, Any]:
    return {
        "reward_model": {"ground_truth": "1" if labeled else None},
        "extra_info": {"pt_id": pt_id, "labeled": labeled},
    }


def rollouts(
    key: str, info: dict[str, Any], right: float, favourite: float, rng: random.Random
) -> list[tuple[str, dict[str, Any]]]:
    """A group's records: the answer 1 is right, 2 the favourite wrong one."""

    def answer() -> int:
        if rng.random() < right:
            return 1
        return 2 if rng.random() < favourite else rng.randrange(3, 30)

    answers = [answer() for _ in range(ROLLOUTS)]
    ((top, count),) = Counter(answers).most_common(1)
    labeled = info["labeled"]
    vote = {"agreement": count / ROLLOUTS, "majority_right": top == 1 if labeled else None}
    return [
        (key, record(info["pt_id"], labeled, route=info["route"], reward=float(a == 1), **vote))
        for a in answers
    ]


@pytest.mark.parametrize(("every", "seed"), [(50, 1), (50, 2), (10, 1), (3, 2)])
def test_a_policy_that_learns_nothing_gets_no_verdict(
    tmp_path: Path, every: int, seed: int
) -> None:
    assert verdicts(tmp_path, lambda skill, step: (skill, 0.0), every, seed, steps=200) == []


@pytest.mark.parametrize("every", [1000, 10, 2])
def test_a_policy_that_collapses_gets_a_verdict_however_often_prompts_move(
    tmp_path: Path, every: int
) -> None:
    def policy(skill: float, step: int) -> tuple[float, float]:
        way = min(1.0, max(0.0, (step - 20) / 40))
        return (0.3 + 0.5 * skill) * (1 - 0.9 * way), way**0.3

    assert verdicts(tmp_path, policy, every, seed=1, steps=90)
