"""verl's V1 trainer made reproducible, stock or with PivotTrace, for runs that are to be compared.

    VERL_USE_EXTERNAL_MODULES=tests.reproducible

Contract: changes verl itself, so it is the same for both sides of a comparison. Three things differ
between two runs of one configuration: the prompts' ids (random; here counted), the order of a
batch's rows (that of arrival; here by id) and what is sampled (by the engine's own state; here by a
seed for each prompt, step and rollout, unless the request has one). What is left is the engine's
batches, which hang on the clock and move log-probabilities by about 1e-7. verl looks for finished
rollouts every 2 seconds; here it does 20 times a second, so that a step's time is its work.
"""

from __future__ import annotations

import hashlib
import itertools
from types import ModuleType, SimpleNamespace
from typing import Any

from pivottrace_verl.cpu.after_import import after_import

POLL_S = 0.05


def count_ids(trainer: ModuleType) -> None:
    """Prompts' ids in the order in which they are drawn."""
    numbers = itertools.count()
    trainer.uuid = SimpleNamespace(uuid4=lambda: f"{next(numbers):032x}")


def sort_rows(replay: ModuleType) -> None:
    """A batch's rows by prompt, then by rollout."""
    buffer = replay.ReplayBuffer
    made, materialize = buffer.__init__, buffer._materialize_batch

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self.poll_interval = POLL_S

    def materialized(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = materialize(self, *args, **kwargs)
        batch.reorder(sorted(range(len(batch.keys)), key=lambda i: place(batch.keys[i])))
        return batch

    buffer.__init__, buffer._materialize_batch = init, materialized


def place(key: str) -> tuple[str, int, int]:
    """Of a trajectory: its prompt's id, its rollout, its output."""
    uid, session, index = key.split("_")
    return uid, int(session), int(index)


def seed_requests(agent_loop: ModuleType) -> None:
    """Each rollout is sampled by a seed of its own."""
    worker = agent_loop.AgentLoopWorker
    run = worker._run_agent_loop

    async def seeded(self: Any, params: dict, trajectory: dict, **kwargs: Any) -> Any:
        what = (kwargs["extra_info"]["pt_id"], trajectory["step"], kwargs["session_id"])
        digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
        seed = int.from_bytes(digest[:4], "big") >> 1
        return await run(self, {"seed": seed, **params}, trajectory, **kwargs)

    worker._run_agent_loop = seeded


after_import("verl.trainer.ppo.v1.trainer_base", count_ids)
after_import("verl.trainer.ppo.v1.replay_buffer", sort_rows)
after_import("verl.experimental.agent_loop.agent_loop", seed_requests)
