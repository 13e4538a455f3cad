"""Weights from the trainer to rollouts in processes of their own, on one machine without a GPU.

verl's `separate_async` trainer sends weights through a checkpoint engine, and all of verl's need a
network of devices. This one writes a file that the rollouts read:

    actor_rollout_ref.rollout.checkpoint_engine.backend=file
    actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module=pivottrace_verl.cpu.weights

For models that fit a CPU: every update writes and reads all weights once.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

from pivottrace_verl.errors import PivotTraceError

WAIT_S = 300.0
"""Longest wait of a rollout for the trainer's file."""


@CheckpointEngineRegistry.register("file")
class FileCheckpointEngine(CheckpointEngine):
    """One folder an update: the trainer's first process writes, every rollout process reads."""

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self._is_master = is_master
        self._path: Path | None = None

    def prepare(self) -> str | None:
        """The file's path, from the process that will write it."""
        if not self._is_master:
            return None
        return os.path.join(tempfile.mkdtemp(prefix="pivottrace-weights-"), "weights.safetensors")

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[Any]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        path = metadata[0]
        return {"path": [path] * actor_wg_world_size}, {"path": [path] * rollout_world_size}

    def init_process_group(self, path: str) -> None:
        self._path = Path(path)

    def finalize(self) -> None:
        if self._is_master and self._path is not None:
            shutil.rmtree(self._path.parent, ignore_errors=True)
        self._path = None

    async def send_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], global_steps: int | None = None
    ) -> None:
        # Every process goes through all of them: sharded weights are gathered on the way.
        held = {}
        for name, tensor in weights:
            if self._is_master:
                held[name] = tensor.detach().cpu().clone().contiguous()
        if self._is_master:
            assert self._path is not None, "verl calls init_process_group first"
            written = self._path.with_suffix(".part")
            save_file(held, written)
            written.rename(self._path)

    async def receive_weights(
        self, global_steps: int | None = None
    ) -> AsyncIterator[tuple[str, torch.Tensor]]:
        assert self._path is not None, "verl calls init_process_group first"
        loop = asyncio.get_running_loop()
        deadline = loop.time() + WAIT_S
        while not self._path.exists():
            if loop.time() > deadline:
                raise PivotTraceError(
                    f"The trainer wrote no weights to {self._path} within {WAIT_S:g} s."
                )
            await asyncio.sleep(0.05)
        for item in load_file(self._path).items():
            yield item
