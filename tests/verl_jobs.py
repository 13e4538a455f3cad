"""Small verl jobs on the CPU platform whose runs can be compared, and what they leave behind.

Contract: a job is one process, stock verl or PivotTrace, under `tests.reproducible`, in a folder of
its own: metrics.jsonl, rollouts/<step>.jsonl, train.log. A small policy that searches countdown
solutions serves them all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pivottrace_verl.cpu.settings import cpu_env, cpu_overrides
from pivottrace_verl.prompts import pt_id

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "recipes" / "quickstart"
STOCK, OURS = "verl.trainer.main_ppo", "pivottrace_verl.training.main_ppo"
REPRODUCIBLE = {
    "VERL_USE_EXTERNAL_MODULES": "tests.reproducible",
    # Where the module is found; Ray's workers take it from their driver.
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
}
SETTINGS = (
    # With its prompt in pieces a seeded request does not draw the same numbers.
    "actor_rollout_ref.rollout.enable_chunked_prefill=False",
    "actor_rollout_ref.rollout.enable_prefix_caching=False",
)
"""Under which a request's seed decides what is sampled."""
APART = ("rollout_corr/", "training/rollout_", "training/epoch")
"""Metrics of the engine's log-probabilities, which hang on how it batched, and the epoch, which
hangs on the length of the file."""


def make_policy(folder: Path, steps: int | None = 1200) -> Path:
    """The quickstart's small policy, trained long enough to be right now and then; without `steps`
    for as long as `--small` says."""
    more = () if steps is None else ("--steps", steps)
    _recipe("make_policy.py", "--out", folder, "--small", *more)
    return folder


def make_pool(folder: Path, n: int, n_val: int = 8) -> Path:
    """pool.jsonl, val.jsonl and answers.jsonl, of the quickstart's problems."""
    _recipe("make_pool.py", "--out", folder, "--n-pool", n, "--n-val", n_val)
    return folder


def _recipe(script: str, *words: str | Path | int) -> None:
    subprocess.run([sys.executable, QUICKSTART / script, *map(str, words)], check=True)


def labelled_rows(data: Path) -> list[dict[str, Any]]:
    """The pool as training rows, all of them annotated."""
    labels = {row["pt_id"]: row["label"] for row in read_lines(data / "answers.jsonl")}
    rows = []
    for i, row in enumerate(read_lines(data / "pool.jsonl")):
        key = pt_id(row["prompt"], row["data_source"])
        info = {"index": i, "pt_id": key, "labeled": True, "route": "annotate", "uncertainty": 0.5}
        rows.append(
            {
                "prompt": row["prompt"],
                "data_source": row["data_source"],
                "reward_model": {"style": "rule", "ground_truth": labels[key]},
                "extra_info": info,
            }
        )
    return rows


def write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Training rows in verl's format."""
    pq.write_table(pa.Table.from_pylist(list(rows)), file)
    return file


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; a last line that was cut off is none."""
    lines = file.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def job_overrides(
    folder: Path, policy: Path, rows: Path, batch_size: int = 8, rollouts: int = 4
) -> list[str]:
    """What all small jobs have in common: one update a step, nothing validated or resumed, and all
    that is left behind in `folder`."""
    return [
        f"actor_rollout_ref.model.path={policy}",
        f"data.train_files={rows}",
        f"data.val_files={rows}",
        f"data.train_batch_size={batch_size}",
        "data.max_prompt_length=64",
        "data.max_response_length=128",
        f"actor_rollout_ref.actor.ppo_mini_batch_size={batch_size}",
        "actor_rollout_ref.actor.optim.lr=1e-4",
        "actor_rollout_ref.actor.use_kl_loss=False",
        f"actor_rollout_ref.rollout.n={rollouts}",
        "actor_rollout_ref.rollout.calculate_log_probs=True",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.resume_mode=disable",
        "trainer.logger=[console,file]",
        f"trainer.default_local_dir={folder / 'checkpoints'}",
        f"trainer.rollout_data_dir={folder / 'rollouts'}",
        f"hydra.run.dir={folder / 'hydra'}",
    ]


def run_job(
    folder: Path,
    module: str,
    policy: Path,
    rows: Path,
    *overrides: str,
    steps: int,
    batch_size: int = 8,
    rollouts: int = 4,
    **env: str,
) -> Path:
    """Run `module`, STOCK or OURS, for `steps` steps; it must end with status 0."""
    folder.mkdir(parents=True)
    extra = {"VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl"), **REPRODUCIBLE, **env}
    answers = "reward.custom_reward_function.reward_kwargs.answers=expression"
    command = [
        *(sys.executable, "-m", module),
        *cpu_overrides(env=extra),
        *SETTINGS,
        *job_overrides(folder, policy, rows, batch_size, rollouts),
        "data.shuffle=False",
        "algorithm.adv_estimator=grpo",
        "actor_rollout_ref.actor.checkpoint.save_contents=[hf_model]",
        "reward.custom_reward_function.path=pkg://pivottrace_verl.training.reward",
        "reward.custom_reward_function.name=compute_score",
        # Stock verl's configuration lacks the key; ours has it.
        f"+{answers}" if module == STOCK else "pivottrace.answers=expression",
        f"trainer.total_training_steps={steps}",
        "trainer.total_epochs=1000000",
        f"trainer.save_freq={steps}",
        *overrides,
    ]
    log = folder / "train.log"
    with log.open("wb") as output:
        status = subprocess.run(
            command,
            env={**os.environ, **cpu_env(), **extra},
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            check=False,
        ).returncode
    assert status == 0, log.read_text(errors="replace")[-5000:]
    return folder


def rollouts(folder: Path) -> list[list[tuple[str, str, str | None, float]]]:
    """Of each step, each trajectory's prompt, response, label and reward, by prompt and rollout."""
    files = sorted(folder.glob("*.jsonl"), key=lambda file: int(file.stem))
    keys = ("input", "output", "gts", "score")
    return [[tuple(row[key] for key in keys) for row in read_lines(file)] for file in files]


def comparable(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The metrics of each step, without what hangs on the clock or on memory."""
    clock = ("timing", "perf/", "agent_loop/", "mfu", "memory", "/seconds/")
    return [
        {name: v for name, v in entry["data"].items() if not any(word in name for word in clock)}
        for entry in entries
    ]


def assert_same_run(found: Path, wanted: Path, steps: int) -> None:
    """Batches, rewards, metrics and weights of two jobs' folders; what only PivotTrace logs is
    left out."""
    assert rollouts(found / "rollouts") == rollouts(wanted / "rollouts")
    metrics = [
        [
            {k: v for k, v in step.items() if not k.startswith(("pivottrace/", *APART))}
            for step in comparable(read_lines(folder / "metrics.jsonl"))
        ]
        for folder in (found, wanted)
    ]
    assert len(metrics[1]) == steps
    assert metrics[0] == metrics[1]
    assert weights(found / "checkpoints", steps) == weights(wanted / "checkpoints", steps)


def weights(folder: Path, step: int) -> bytes:
    """The trained model's, as they are on disk."""
    files = sorted((folder / f"global_step_{step}" / "actor" / "huggingface").glob("*.safetensors"))
    assert files
    return b"".join(file.read_bytes() for file in files)
