"""verl's rows from a run directory: train.parquet and val.parquet.

Contract: verl's columns plus `extra_info.{index,pt_id,labeled,route,uncertainty}`. Dropped prompts
and prompts in review are absent. A ground truth stands only where the ledger holds a bought label;
everywhere else it is null, so that no component of the training process could read what was not
paid for. Imports no verl: stock verl reads these files without us.

Axes: P rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.files import read_schema, write_table_atomic
from pivottrace_verl.pool import RunDir


def train_table(run: RunDir, *, self_train: bool = True) -> pa.Table:
    """One verl row for each prompt that is trained on, in the pool's order; without `self_train`
    only those with a label.

    Raises PivotTraceError if a prompt on route annotate has no label yet.
    """
    plan = run.plan()
    routes = ["annotate", "self_train"] if self_train else ["annotate"]
    kept = pc.is_in(plan["route"], value_set=pa.array(routes))
    plan = plan.filter(kept)
    # The plan is in the pool's order.
    prompts = run.pool_table(["prompt", "data_source"]).filter(kept)
    labels = run.ledger().labels()
    at = pc.index_in(plan["pt_id"], value_set=pa.array(list(labels), pa.string()))
    label = pa.chunked_array([pa.array(list(labels.values()), pa.string())]).take(at)
    annotate = pc.equal(plan["route"], "annotate")
    waiting = plan["pt_id"].filter(pc.and_(annotate, pc.is_null(label)))
    if len(waiting):
        raise PivotTraceError(
            f"{len(waiting)} prompts on route annotate have no label yet (first: {waiting[0]}): "
            "run `pivottrace annotate export`, have the file filled, and import it."
        )
    truth = pc.if_else(annotate, label, pa.scalar(None, pa.string()))
    return _table(prompts, truth, plan["pt_id"], plan["route"], plan["uncertainty"])


def val_table(run: RunDir) -> pa.Table:
    """One verl row a validation prompt, with its label; no rows if the run has none."""
    found = run.validation_table()
    n = found.num_rows
    route, uncertainty = pa.repeat("validation", n), pa.repeat(0.0, n)
    prompts = found.select(["prompt", "data_source"])
    return _table(prompts, found["label"], found["pt_id"], route, uncertainty)


def _table(
    prompts: pa.Table, truth: pa.Array, pt_id: pa.Array, route: pa.Array, u: pa.Array
) -> pa.Table:
    """[P] columns -> verl's rows."""
    n = prompts.num_rows
    reward = {"style": pa.repeat("rule", n), "ground_truth": truth}
    extra = {
        "index": pa.array(np.arange(n)),
        "pt_id": pt_id,
        "labeled": pc.is_valid(truth),
        "route": route,
        "uncertainty": u,
    }
    return pa.table(
        {
            "prompt": prompts["prompt"],
            "data_source": prompts["data_source"],
            "reward_model": _struct(reward),
            "extra_info": _struct(extra),
        }
    )


def _struct(fields: dict[str, pa.Array]) -> pa.Array:
    whole = [f.combine_chunks() if isinstance(f, pa.ChunkedArray) else f for f in fields.values()]
    return pa.StructArray.from_arrays(whole, list(fields))


def training_tables(run: RunDir, batch_size: int = 1) -> tuple[pa.Table, pa.Table]:
    """Rows to train on and to validate on. PivotTraceError if the first do not fill one batch."""
    train = train_table(run)
    if train.num_rows < batch_size:
        raise PivotTraceError(
            f"Only {train.num_rows} prompts are left to train on, fewer than one batch of "
            f"{batch_size}: lower --batch-size or triage again with other thresholds."
        )
    return train, val_table(run)


def write_training_files(run: RunDir, train: pa.Table, val: pa.Table) -> None:
    """Write RUN/train/{train,val}.parquet."""
    write_table_atomic(run.path / "train" / "train.parquet", train)
    write_table_atomic(run.path / "train" / "val.parquet", val)


@dataclass(frozen=True)
class Exported:
    """What an export wrote."""

    labelled: int
    """Training rows with a bought label."""
    self_train: int
    """Training rows without one: our trainer votes in its place."""
    left_out: int
    """self_train prompts that are not in the file."""
    validation: int
    """Validation rows; without any there is no val.parquet."""

    def sentences(self, folder: Path) -> list[str]:
        """What a person wants to know."""
        out = [f"{self.labelled} labelled prompts written to {folder / 'train.parquet'}."]
        if self.self_train:
            out.append(
                f"{self.self_train} self_train rows there have a null ground truth and need "
                "PivotTrace's trainer (`pivottrace train`): stock verl cannot reward them."
            )
        if self.left_out:
            out.append(
                f"{self.left_out} self_train prompts have no label and are left out; "
                "--with-self-train adds them for PivotTrace's trainer."
            )
        out.append(
            f"{self.validation} validation prompts written to {folder / 'val.parquet'}."
            if self.validation
            else "The run has no validation prompts, so there is no val.parquet."
        )
        return out


def export_for_verl(run: RunDir, folder: Path, *, self_train: bool = False) -> Exported:
    """Write folder/train.parquet and folder/val.parquet, for stock verl unless `self_train` adds
    the rows that only our trainer can use.

    Raises PivotTraceError, with nothing written, if a label is missing, no row is left, or files
    of these names are there that did not come from an export.
    """
    train, val = train_table(run, self_train=self_train), val_table(run)
    if not train.num_rows:
        raise PivotTraceError(
            f"The plan of {run.path} leaves no prompt to export"
            + ("." if self_train else " with a label: only self_train rows are trained on.")
        )
    _keep_others(folder)
    planned = pc.sum(pc.equal(run.plan()["route"], "self_train")).as_py() or 0
    chosen = planned if self_train else 0
    write_table_atomic(folder / "train.parquet", train)
    if val.num_rows:
        write_table_atomic(folder / "val.parquet", val)
    return Exported(train.num_rows - chosen, chosen, planned - chosen, val.num_rows)


def _keep_others(folder: Path) -> None:
    """Refuse to replace other people's training data: verl's own has files of these names."""
    for name in ("train.parquet", "val.parquet"):
        path = folder / name
        if path.is_file() and "pt_id" not in _extra_info(read_schema(path)):
            raise PivotTraceError(
                f"{path} is there already and did not come from an export: export to another "
                "folder."
            )


def _extra_info(schema: pa.Schema) -> list[str]:
    """Names in the column extra_info; none if it is no struct."""
    kind = schema.field("extra_info").type if "extra_info" in schema.names else pa.null()
    return [field.name for field in kind] if pa.types.is_struct(kind) else []
