"""Factories: a run directory with scores, probes and a plan, and files that annotators filled."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pivottrace_verl.pool import RunDir
from tests.score_table import score_row


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunDir]:
    """A run of `prompts`; with `plan`, scored and every prompt routed to annotate, the first the
    most uncertain."""

    def make(
        prompts: int | Sequence[str] = 6, kind: str = "exact", plan: bool = True, name: str = "run"
    ) -> RunDir:
        texts = (
            [f"What is {i} + 1?" for i in range(prompts)] if isinstance(prompts, int) else prompts
        )
        rows = [{"prompt": [{"role": "user", "content": t}], "data_source": "s"} for t in texts]
        pool = tmp_path / f"{name}-pool.jsonl"
        pool.write_text("".join(json.dumps(row) + "\n" for row in rows))
        model = tmp_path / "model"
        model.mkdir(exist_ok=True)
        (model / "config.json").write_text('{"model_type": "llama"}')
        (model / "model.safetensors").write_bytes(bytes(1000))
        run = RunDir.create(tmp_path / name, pool, model, answers_kind=kind)
        if plan:
            run.write_score_part(
                0, [score_row(i, [(str(k), 4)]) for k, i in enumerate(ids_of(run))]
            )
            run.merge_scores()
            write_plan(run, ids_of(run))
        return run

    return make


def ids_of(run: RunDir) -> list[str]:
    return [prompt.pt_id for prompt in run.pool()]


def write_plan(
    run: RunDir, annotate: Sequence[str], info: dict[str, Any] | None = None, reason: str = "x"
) -> None:
    """All of `annotate` wait for a label, most uncertain first; the rest is dropped."""
    order = [*annotate, *(i for i in ids_of(run) if i not in annotate)]
    rows = [
        {
            "pt_id": pt_id,
            "route": "annotate" if pt_id in annotate else "drop",
            "uncertainty": 1 - order.index(pt_id) / len(order),
            "rank": order.index(pt_id) + 1,
            "reason": reason,
        }
        for pt_id in ids_of(run)
    ]
    run.write_plan(rows, info or {})
