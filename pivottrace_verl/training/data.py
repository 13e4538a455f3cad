"""verl's rows from a run directory: train.parquet and val.parquet.

Contract: verl's columns plus `extra_info.{index,pt_id,labeled,route,uncertainty}`. Dropped prompts
are absent. A ground truth stands only where the ledger holds a bought label; everywhere else it is
null, so that no component of the training process could read what was not paid for.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.files import write_table_atomic
from pivottrace_verl.pool import RunDir
from pivottrace_verl.schemas import MESSAGES

_SCHEMA = pa.schema(
    [
        ("prompt", MESSAGES),
        ("data_source", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        (
            "extra_info",
            pa.struct(
                [
                    ("index", pa.int64()),
                    ("pt_id", pa.string()),
                    ("labeled", pa.bool_()),
                    ("route", pa.string()),
                    ("uncertainty", pa.float64()),
                ]
            ),
        ),
    ]
)


def train_rows(run: RunDir) -> list[dict[str, Any]]:
    """One verl row for each prompt that is trained on, in the pool's order.

    Raises PivotTraceError if a prompt on route annotate has no label yet.
    """
    plan = {row["pt_id"]: row for row in run.plan().to_pylist()}
    labels = run.ledger().labels()
    rows: list[dict[str, Any]] = []
    waiting: list[str] = []
    for prompt in run.pool():
        entry = plan[prompt.pt_id]
        if entry["route"] == "drop":
            continue
        labeled = entry["route"] == "annotate"
        if labeled and prompt.pt_id not in labels:
            waiting.append(prompt.pt_id)
            continue
        rows.append(
            _row(
                prompt.messages,
                prompt.data_source,
                labels[prompt.pt_id] if labeled else None,
                pt_id=prompt.pt_id,
                index=len(rows),
                route=entry["route"],
                uncertainty=entry["uncertainty"],
            )
        )
    if waiting:
        raise PivotTraceError(
            f"{len(waiting)} prompts on route annotate have no label yet (first: {waiting[0]}): "
            "run `pivottrace annotate export`, have the file filled, and import it."
        )
    return rows


def _row(
    messages: list[dict[str, str]],
    data_source: str,
    label: str | None,
    *,
    pt_id: str,
    index: int,
    route: str,
    uncertainty: float,
) -> dict[str, Any]:
    return {
        "prompt": messages,
        "data_source": data_source,
        "reward_model": {"style": "rule", "ground_truth": label},
        "extra_info": {
            "index": index,
            "pt_id": pt_id,
            "labeled": label is not None,
            "route": route,
            "uncertainty": float(uncertainty),
        },
    }


def write_training_files(run: RunDir) -> tuple[int, int]:
    """Write RUN/train/{train,val}.parquet; returns the numbers of rows."""
    folder = run.path / "train"
    train = train_rows(run)
    val = [
        _row(
            prompt.messages,
            prompt.data_source,
            label,
            pt_id=prompt.pt_id,
            index=index,
            route="validation",
            uncertainty=0.0,
        )
        for index, (prompt, label) in enumerate(run.validation())
    ]
    write_table_atomic(folder / "train.parquet", pa.Table.from_pylist(train, schema=_SCHEMA))
    write_table_atomic(folder / "val.parquet", pa.Table.from_pylist(val, schema=_SCHEMA))
    return len(train), len(val)
