"""verl's store of rollouts, TransferQueue, in this process's memory: the four calls that trainers
make of it, in its forms, without the processes that it runs in.

    store = MemoryStore()
    store.install(monkeypatch)          # for every module that says `tq.`
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transfer_queue
from tensordict import NonTensorStack, TensorDict
from transfer_queue import KVBatchMeta


class MemoryStore:
    """Rows by partition and key: fields, and tags."""

    def __init__(self) -> None:
        self.fields: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
        self.tags: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
        self.puts: list[list[str]] = []
        """Names of the fields of each put."""
        self.gets: list[list[str] | None] = []
        """Names of the fields that each get asked for."""

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("kv_batch_put", "kv_batch_get", "kv_list", "kv_clear"):
            patch.setattr(transfer_queue, name, getattr(self, name))

    def kv_batch_put(
        self,
        keys: Sequence[str],
        partition_id: str,
        fields: TensorDict | None = None,
        tags: Sequence[dict[str, Any]] | None = None,
    ) -> KVBatchMeta:
        names = [] if fields is None else list(fields.keys())
        self.puts.append(names)
        for name in names:
            column = fields[name]
            rows = column.unbind() if hasattr(column, "unbind") else list(column)
            for key, value in zip(keys, rows, strict=True):
                # A copy, as in another process.
                self.fields[partition_id].setdefault(key, {})[name] = copy.deepcopy(value)
        for key, tag in zip(keys, tags or [{} for _ in keys], strict=True):
            self.tags[partition_id].setdefault(key, {}).update(tag)
        return self.meta(list(keys), partition_id, names)

    def meta(
        self, keys: list[str], partition_id: str, names: list[str] | None = None
    ) -> KVBatchMeta:
        tags = [self.tags[partition_id][key] for key in keys]
        return KVBatchMeta(keys=keys, tags=tags, partition_id=partition_id, fields=names)

    def kv_batch_get(
        self, keys: Sequence[str], partition_id: str, select_fields: Sequence[str] | None = None
    ) -> TensorDict:
        self.gets.append(None if select_fields is None else list(select_fields))
        rows = [self.fields[partition_id][key] for key in keys]
        names = [n for n in rows[0] if select_fields is None or n in select_fields]
        columns = {name: [copy.deepcopy(row[name]) for row in rows] for name in names}
        return TensorDict(
            {
                # Jagged, also where all rows are of one length.
                name: torch.nested.as_nested_tensor(column, layout=torch.jagged)
                if isinstance(column[0], torch.Tensor)
                else NonTensorStack(*column)
                for name, column in columns.items()
            },
            batch_size=[len(rows)],
        )

    def kv_list(self) -> dict[str, dict[str, dict[str, Any]]]:
        return copy.deepcopy({part: tags for part, tags in self.tags.items() if tags})

    def kv_clear(self, keys: Sequence[str], partition_id: str) -> None:
        for key in keys:
            self.fields[partition_id].pop(key, None)
            self.tags[partition_id].pop(key, None)
