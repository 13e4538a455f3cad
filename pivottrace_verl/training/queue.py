"""The one module that touches TransferQueue, verl's store of rollouts between its stages.

Upstream may replace TransferQueue: everything else asks here for columns by key.
"""

from __future__ import annotations

from typing import Any

import transfer_queue as tq
from tensordict import TensorDict


def records(keys: list[str], partition: str) -> list[dict[str, Any]]:
    """What `agent_loop` left under `extra_fields["pivottrace"]` of each trajectory, {} if nothing;
    verl's padding has that of the row that it was made from."""
    if not keys:
        return []
    data = tq.kv_batch_get(keys=keys, partition_id=partition, select_fields=["extra_fields"])
    return [extra.get("pivottrace", {}) for extra in data.pop("extra_fields").tolist()]


def whole(keys: list[str], records: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """(uid, record) of each rollout: in several trajectories, only the last has a whole one."""
    pairs = zip(keys, records, strict=True)
    return [(key.split("_", 1)[0], record) for key, record in pairs if "reward" in record]


def column(batch: Any, name: str) -> Any:
    """One column of the batch, a jagged nested tensor, rows in the batch's order."""
    return tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=[name])[
        name
    ]


def put(batch: Any, fields: Any) -> Any:
    """Write columns back, rows in the batch's order; returns the batch's new handle."""
    return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)


def columns(**values: Any) -> TensorDict:
    """Columns in the form `put` wants, one row each."""
    rows = next(iter(values.values())).size(0)
    return TensorDict(values, batch_size=[rows])
