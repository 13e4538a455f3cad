"""Off equals stock: with the kill switch our `main_ppo` is verl's, metric for metric.

Rollouts are made reproducible first (greedy, one replica), and stock verl is shown to
equal itself under those settings; otherwise an equality would prove nothing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pivottrace_verl.cpu.settings import cpu_env, cpu_overrides

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "quickstart"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy and labelled rows in verl's format."""
    path = tmp_path_factory.mktemp("kill_switch")
    for command in (
        ("make_policy.py", "--out", path / "policy", "--small"),
        ("make_pool.py", "--out", path / "data", "--n-pool", "32", "--n-val", "8"),
    ):
        words = [str(word) for word in command[1:]]
        subprocess.run([sys.executable, RECIPE / command[0], *words], check=True)
    labels = {}
    for line in (path / "data" / "answers.jsonl").read_text().splitlines():
        labels[json.loads(line)["pt_id"]] = json.loads(line)["label"]
    pool = [json.loads(line) for line in (path / "data" / "pool.jsonl").read_text().splitlines()]
    rows = [
        {
            "prompt": row["prompt"],
            "data_source": row["data_source"],
            "reward_model": {"style": "rule", "ground_truth": label},
            "extra_info": {"index": i},
        }
        for i, (row, label) in enumerate(zip(pool, labels.values(), strict=True))
    ]
    pq.write_table(pa.Table.from_pylist(rows), path / "rows.parquet")
    return path


def metrics(work: Path, name: str, module: str, **env: str) -> list[dict[str, Any]]:
    """What two steps of training log, without what depends on the clock or on memory."""
    file = work / f"{name}.jsonl"
    extra = {"VERL_FILE_LOGGER_PATH": str(file), **env}
    overrides = [
        *cpu_overrides(env=extra),
        f"actor_rollout_ref.model.path={work / 'policy'}",
        f"data.train_files={work / 'rows.parquet'}",
        f"data.val_files={work / 'rows.parquet'}",
        "data.train_batch_size=8",
        "data.max_prompt_length=64",
        "data.max_response_length=128",
        "data.shuffle=False",
        "algorithm.adv_estimator=reinforce_plus_plus",
        "actor_rollout_ref.actor.ppo_mini_batch_size=8",
        "actor_rollout_ref.actor.optim.lr=1e-4",
        "actor_rollout_ref.actor.use_kl_loss=False",
        "actor_rollout_ref.rollout.n=1",
        # Greedy, while log-probabilities stay those of temperature 1; full_determinism asks for
        # kernels that vLLM has for GPUs only.
        "actor_rollout_ref.rollout.top_k=1",
        "actor_rollout_ref.rollout.enable_chunked_prefill=False",
        "actor_rollout_ref.rollout.calculate_log_probs=True",
        "reward.custom_reward_function.path=pkg://pivottrace_verl.training.reward",
        "reward.custom_reward_function.name=compute_score",
        "trainer.total_training_steps=2",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        "trainer.resume_mode=disable",
        "trainer.logger=[console,file]",
        f"hydra.run.dir={work / name}",
    ]
    answers = "reward.custom_reward_function.reward_kwargs.answers=expression"
    # Stock verl's configuration lacks the key; ours has it.
    overrides.append(
        f"+{answers}" if module.startswith("verl.") else "pivottrace.answers=expression"
    )
    log = work / f"{name}.log"
    with log.open("wb") as output:
        status = subprocess.run(
            [sys.executable, "-m", module, *overrides],
            env={**os.environ, **cpu_env(), **extra},
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=work,
            check=False,
        ).returncode
    assert status == 0, log.read_text(errors="replace")[-5000:]
    clock = ("timing", "perf/", "agent_loop/", "time", "mfu", "memory")
    steps = [json.loads(line) for line in file.read_text().splitlines()]
    return [
        {k: v for k, v in step["data"].items() if not any(word in k for word in clock)}
        for step in steps
    ]


def assert_same(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    """Equal up to the order of summation: verl orders rows by the prompts' random ids."""
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        # The file logger writes NaN as null, which has to be null on both sides.
        assert [k for k, v in a.items() if v is None] == [k for k, v in b.items() if v is None]
        numbers = {k: v for k, v in b.items() if v is not None}
        assert {k: v for k, v in a.items() if v is not None} == pytest.approx(
            numbers, rel=1e-5, abs=1e-7
        )


@pytest.fixture(scope="module")
def stock(work: Path) -> list[dict[str, Any]]:
    return metrics(work, "stock", "verl.trainer.main_ppo")


def test_stock_verl_equals_itself_under_these_settings(
    work: Path, stock: list[dict[str, Any]]
) -> None:
    assert len(stock) == 2 and any(step["actor/grad_norm"] > 0 for step in stock)
    assert_same(metrics(work, "stock_again", "verl.trainer.main_ppo"), stock)


def test_with_the_kill_switch_our_trainer_equals_stock_verl(
    work: Path, stock: list[dict[str, Any]]
) -> None:
    ours = metrics(work, "ours", "pivottrace_verl.training.main_ppo", PIVOTTRACE_DISABLE="1")
    assert_same(ours, stock)
    assert not any(name.startswith("pivottrace/") for step in ours for name in step)
