"""verl's asynchronous trainers, agent loops of several turns, LoRA and processes that die, each in
a real job with the curriculum, the votes and the capture on."""

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pivottrace_verl.attention.channel import LOSSES
from pivottrace_verl.curriculum import ROUTES
from tests.e2e import two_turns
from tests.e2e.verl_job import Job

pytestmark = pytest.mark.slow


@pytest.fixture
def job(work: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Job]]:
    """Starts jobs, and ends those that are left."""
    started: list[Job] = []

    def start(*overrides: str) -> Job:
        # Hydra reads brackets in a path as a list.
        name = re.sub(r"\W+", "-", request.node.name)
        started.append(Job(work, f"{name}-{len(started)}", *overrides))
        return started[-1]

    yield start
    for one in started:
        one.stop()


def trained(job: Job) -> list[dict[str, Any]]:
    """The steps of a job that must end well, each with every rollout traced."""
    assert job.wait() == 0, job.words()[-5000:]
    steps = job.metrics()
    for step in steps:
        assert step["pivottrace/capture/traced"] == 32 and step["pivottrace/capture/missed"] == 0
        assert not any(step[f"pivottrace/capture/{name}"] for name in LOSSES)
        assert step["pivottrace/rollouts/failed"] == 0
        routes = [name for name in ROUTES if f"pivottrace/{name}/prompts" in step]
        assert sum(step[f"pivottrace/{name}/prompts"] for name in routes) == 8
        assert all(f"pivottrace/{name}/pivot_density" in step for name in routes)
    return steps


COLOCATE = (
    "trainer.v1.trainer_mode=colocate_async",
    "trainer.v1.colocate_async.num_warmup_batches=2",
)


def test_colocate_async_trains_resumes_and_loses_no_prompt(job: Callable[..., Job]) -> None:
    first = job(*COLOCATE, "trainer.total_training_steps=3", "trainer.save_freq=2")
    steps = trained(first)
    assert len(steps) == 3
    # Whether a rollout went on under new weights is a matter of timing; `trained` sees that its
    # traces came together where it did.
    second = job(
        *COLOCATE,
        "trainer.total_training_steps=6",
        "trainer.resume_mode=resume_path",
        f"trainer.resume_from_path={first.folder / 'checkpoints' / 'global_step_2'}",
    )
    assert len(trained(second)) == 4
    # In flight at the checkpoint were two batches; with them, 6 steps are 48 of the 64 prompts.
    assert "Restored 16 training prompt groups" in second.words()
    seen = [prompt for step in (1, 2) for prompt in first.prompts(step)]
    seen += [prompt for step in (3, 4, 5, 6) for prompt in second.prompts(step)]
    assert len(seen) == len(set(seen)) == 48


def test_separate_async_trains_with_rollouts_in_a_process_of_their_own(
    job: Callable[..., Job],
) -> None:
    engine = "actor_rollout_ref.rollout.checkpoint_engine"
    one = job(
        "trainer.v1.trainer_mode=separate_async",
        "trainer.v1.separate_async.parameter_sync_step=2",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.rollout.nnodes=1",
        "actor_rollout_ref.rollout.n_gpus_per_node=1",
        "actor_rollout_ref.hybrid_engine=False",
        # verl 0.9.1 logs this setting with an argument that loggers do not take.
        "+ray_kwargs.ray_init.runtime_env.env_vars.VERL_LOGGING_LEVEL=WARN",
        f"{engine}.backend=file",
        f"{engine}.custom_backend_module=pivottrace_verl.cpu.weights",
        "ray_kwargs.ray_init.num_gpus=2",
        "trainer.total_training_steps=3",
    )
    steps = trained(one)
    assert len(steps) == 3
    # The trainer's weights reach the other process: what it generates follows them.
    assert max(step["training/rollout_probs_diff_mean"] for step in steps) < 0.05


def test_an_agent_loop_of_two_turns_is_traced_whole_and_its_tool_never_answers(
    job: Callable[..., Job], tmp_path: Path
) -> None:
    loops = tmp_path / "loops.yaml"
    loops.write_text(json.dumps([{"name": "two", "_target_": "tests.e2e.two_turns.TwoTurns"}]))
    agent = "actor_rollout_ref.rollout.agent"
    one = job(
        f"{agent}.agent_loop_config_path={loops}",
        f"{agent}.default_agent_loop=two",
        "trainer.total_training_steps=2",
    )
    steps = trained(one)
    assert len(steps) == 2
    for number, step in enumerate(steps, 1):
        lines = (one.folder / "rollouts" / f"{number}.jsonl").read_text().splitlines()
        outputs = [json.loads(line)["output"] for line in lines]
        assert all(two_turns.TOOL_SAYS.strip() in output for output in outputs)
        # Were the tool's words an answer, every group would agree on it.
        assert step["pivottrace/self_train/agreement"] < 1.0


def test_lora_trains(job: Callable[..., Job]) -> None:
    one = job(
        "actor_rollout_ref.model.lora_rank=8",
        "actor_rollout_ref.model.lora_alpha=16",
        "actor_rollout_ref.rollout.load_format=safetensors",
        "trainer.total_training_steps=2",
    )
    assert len(trained(one)) == 2


def test_groups_that_verl_filters_out_are_replaced_and_observed(job: Callable[..., Job]) -> None:
    one = job(
        "algorithm.filter_groups.enable=true",
        "algorithm.filter_groups.metric=acc",
        "data.gen_batch_size=2",
        "actor_rollout_ref.actor.use_dynamic_bsz=true",
        "trainer.total_training_steps=2",
    )
    for step in trained(one):
        present = [name for name in ROUTES if f"pivottrace/{name}/prompts" in step]
        # The reward that verl filters by is the vote's where no label was bought.
        assert all(step[f"pivottrace/{name}/mixed"] == 1.0 for name in present)
        evicted = step["training/filter_groups/evicted_samples"]
        surplus = step.get("training/filter_groups/discarded_surplus_samples", 0.0)
        set_aside = sum(step.get(f"pivottrace/set_aside/{name}", 0.0) for name in ROUTES)
        assert evicted > 0 and set_aside == evicted + surplus


@pytest.mark.parametrize(
    ("process", "status", "said"),
    [
        ("PivotAgentLoopWorker", 2, "The agent-loop worker 0 died. Rollouts were lost with it"),
        ("VLLM::EngineCore", 2, "The vLLM engine of rollout replica 0 died. Rollouts were lost"),
        ("PivotTaskRunner", 1, "the process that runs the training died, so training stops"),
    ],
)
def test_a_process_that_is_killed_ends_the_job_with_a_sentence(
    job: Callable[..., Job], process: str, status: int, said: str
) -> None:
    one = job("trainer.total_training_steps=1000")
    one.wait(lambda: bool(one.metrics()))
    # In the middle of the second step.
    time.sleep(1.0)
    one.kill(process)
    start = time.monotonic()
    assert one.wait() == status
    assert time.monotonic() - start < 90
    assert f"error: {said}" in one.words()[-3000:]
