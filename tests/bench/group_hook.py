"""What the group hook costs the agent-loop workers, whatever the verifier costs.

    python -m tests.bench.group_hook --out tests/bench/results/group_hook.json

A batch of 64 prompts x 16 rollouts goes through `training.agent_loop`: each rollout's request
opened and its answer taken, its pivots counted, its group judged, its record written. The engine,
the reward workers and verl's store give or take at once what they are handed, and answers are
compared as strings. `cpu_s` is processor time of all threads, beyond that of the same coroutines
without the hook; `logprobs` is with the mean log-probability of each rollout, which re-triage and
weighted votes ask for. Median of the repeats.
"""

import argparse
import asyncio
import gc
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from verl.experimental.agent_loop import AgentLoopOutput
from verl.workers.rollout.replica import TokenOutput

from pivottrace_verl.files import write_json_atomic
from pivottrace_verl.training.client import Rollout
from tests.group_hook import HookWorker, Verl

PROMPTS, ROLLOUTS, REPEATS = 64, 16, 25
LENGTHS = (900, 8192)
PARAMS = {"temperature": 1.0, "top_p": 1.0, "logprobs": True}

Batch = dict[tuple[str, int], tuple[AgentLoopOutput, TokenOutput]]


def batch(length: int, rng: np.random.Generator) -> Batch:
    """What the engine and the agent loop made of each rollout; about one token in 20 is a change
    that may be a pivot."""
    made = {}
    for prompt in range(PROMPTS):
        for session in range(ROLLOUTS):
            logprobs = (-rng.exponential(size=length)).tolist()
            signal = np.cumsum(np.where(rng.random(length) < 0.05, rng.normal(size=length), 0.0))
            tokens = rng.integers(0, 150_000, size=length).tolist()
            output = AgentLoopOutput(
                prompt_ids=list(range(200)),
                response_ids=tokens,
                response_mask=[1] * length,
                response_logprobs=logprobs,
                metrics={},
                extra_fields={},
            )
            part = {"signal": signal.astype(np.float32), "entropy_sum": float(length)}
            answer = TokenOutput(
                token_ids=tokens, log_probs=logprobs, extra_fields={"pivottrace": part}
            )
            made[f"u{prompt}", session] = output, answer
    return made


def score(output: AgentLoopOutput) -> tuple[float, dict[str, Any]]:
    """Five answers, one of them more often than the others."""
    pred = str(max(0, output.response_ids[0] % 8 - 3))
    return 0.0, {"score": 0.0, "acc": 0.0, "pred": pred, "parsed": 1.0, "timed_out": 0.0}


class Without(Verl):
    """The same coroutines without the hook."""

    def __init__(self, generate: Any) -> None:
        self.generate, self.score = generate, score
        self.became: dict[str, list[Any]] = {}
        self.published: dict[tuple[str, int], float] = {}
        self._rollouts: dict[tuple[str, int], Rollout] = {}


def seconds(made: Batch, hook: bool, logprobs: bool) -> float:
    """Processor time of one batch."""
    fresh = {
        key: (
            output.model_copy(update={"extra_fields": {}}),
            answer.model_copy(update={"extra_fields": dict(answer.extra_fields)}),
        )
        for key, (output, answer) in made.items()
    }

    def generate(rollout: Rollout | None, uid: str, session: int) -> list[Any]:
        output, answer = fresh[uid, session]
        if rollout is not None:
            turn = rollout.turn(len(output.prompt_ids))
            turn.ask(PARAMS)
            turn.take(answer)
        return [output]

    async def run() -> None:
        worker: Any = HookWorker(generate, score, logprobs=logprobs) if hook else Without(generate)
        info = {"pt_id": "p", "route": "self_train", "labeled": False}
        await asyncio.gather(
            *(
                worker._run_prompt(
                    {"uid": f"u{prompt}", "extra_info": info, "__rollout_n__": ROLLOUTS},
                    {},
                    {"validate": False, "step": 1},
                )
                for prompt in range(PROMPTS)
            )
        )
        failed = [x for rows in worker.became.values() for x in rows if not isinstance(x, float)]
        assert len(worker.became) == PROMPTS and not failed, failed[:1]

    # Else the batch itself is what the collector looks through, at random.
    gc.collect()
    gc.freeze()
    start = time.process_time()
    asyncio.run(run())
    found = time.process_time() - start
    gc.unfreeze()
    return found


def measure(length: int) -> dict[str, float]:
    """Beyond the coroutines without the hook."""
    made = batch(length, np.random.default_rng(0))
    found: dict[str, list[float]] = {"cpu_s": [], "cpu_s_logprobs": []}
    seconds(made, hook=True, logprobs=True)
    for _ in range(REPEATS):
        bare = seconds(made, hook=False, logprobs=False)
        found["cpu_s"].append(seconds(made, hook=True, logprobs=False) - bare)
        found["cpu_s_logprobs"].append(seconds(made, hook=True, logprobs=True) - bare)
    return {name: round(statistics.median(values), 4) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    args = parser.parse_args()
    result = {
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
        "prompts": PROMPTS,
        "rollouts": ROLLOUTS,
        "tokens": {str(length): measure(length) for length in LENGTHS},
    }
    if args.out:
        write_json_atomic(args.out, result)
    json.dump(result, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
