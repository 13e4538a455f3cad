"""The one module that touches TransferQueue, verl's store of rollouts between its stages.

Upstream may replace TransferQueue: everything else asks here for columns by key.
"""

from __future__ import annotations

from typing import Any

import transfer_queue as tq
from tensordict import TensorDict


def records(batch: Any) -> list[tuple[str, dict[str, Any]]]:
    """(uid, record) of every real trajectory of the batch; padding rows are skipped.

    A record is what `agent_loop` left under `extra_fields["pivottrace"]`; of a rollout in several
    trajectories only the last has a whole one.
    """
    keys = [k for k, t in zip(batch.keys, batch.tags, strict=True) if not t.get("is_padding")]
    return records_of(keys, batch.partition_id)


def records_of(keys: list[str], partition: str) -> list[tuple[str, dict[str, Any]]]:
    """`records` of trajectories by key."""
    if not keys:
        return []
    data = tq.kv_batch_get(keys=keys, partition_id=partition, select_fields=["extra_fields"])
    fields = data.pop("extra_fields").tolist()
    return [
        (key.split("_", 1)[0], extra["pivottrace"])
        for key, extra in zip(keys, fields, strict=True)
        if "reward" in extra.get("pivottrace", {})
    ]


def column(batch: Any, name: str) -> Any:
    """One column of the batch, a jagged nested tensor, rows in the batch's order."""
    return tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=[name])[
        name
    ]


def extra_fields(batch: Any) -> list[dict[str, Any]]:
    """`extra_fields` of every row, padding included, in the batch's order."""
    data = tq.kv_batch_get(
        keys=batch.keys, partition_id=batch.partition_id, select_fields=["extra_fields"]
    )
    return list(data.pop("extra_fields").tolist())


def put(batch: Any, fields: Any) -> Any:
    """Write columns back, rows in the batch's order; returns the batch's new handle."""
    return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)


def columns(**values: Any) -> TensorDict:
    """Columns in the form `put` wants, one row each."""
    rows = next(iter(values.values())).size(0)
    return TensorDict(values, batch_size=[rows])
