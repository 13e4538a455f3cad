"""The lines of verl 0.9.1 that cannot work without a GPU, put right at run time.

Applied by the `verl.plugins` entry point, so in every process that imports verl, before the modules
that take these functions by name are imported. Each has its diff in `patches/`.
"""

import functools
import os
from types import ModuleType
from typing import Any

from pivottrace_verl.cpu import distribution
from pivottrace_verl.cpu.after_import import after_import

_MARK = "_pivottrace_cpu"


def install() -> list[str]:
    """Apply every shim once; returns the names of those in force.

    Raises whatever the import of verl's platform package raises: the caller tells the user.
    """
    from pivottrace_verl.cpu import platform

    platform.register()
    # verl registers its FSDP engines for cuda and npu only
    # (verl/workers/engine/fsdp/transformer_impl.py:1143) and offers this variable to choose one
    # (verl/workers/engine/base.py:405); tensors stay where the platform says.
    os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")
    installed = ["platform", "engine_device"]
    if distribution.install():
        installed.append("distribution_name")
    after_import("verl.utils.distributed", shim_process_group)
    after_import("verl.workers.engine.fsdp.transformer_impl", shim_pinned_offload)
    return [*installed, "process_group", "pinned_offload"]


def shim_process_group(distributed: ModuleType) -> None:
    """Stand in for verl/utils/distributed.py:89.

    The default backend there is f"cpu:gloo,{device}:{backend}", which for the CPU names one device
    twice ("cpu:gloo,cpu:gloo"); torch refuses that.
    """
    original = distributed.initialize_global_process_group_ray
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def initialize(timeout_second: float | None = None, backend: str | None = None) -> None:
        original(timeout_second=timeout_second, backend=backend or "gloo")

    setattr(initialize, _MARK, True)
    distributed.initialize_global_process_group_ray = initialize  # type: ignore[attr-defined]


def shim_pinned_offload(transformer_impl: ModuleType) -> None:
    """Stand in for verl/workers/engine/fsdp/transformer_impl.py:462.

    A reference model is always loaded under CPUOffloadPolicy(pin_memory=True); pinning memory needs
    an accelerator to pin it for. On the CPU the policy has nothing to move and nothing to pin.
    """
    original = transformer_impl.CPUOffloadPolicy
    if getattr(original, _MARK, False):
        return

    def unpinned(pin_memory: bool = False) -> Any:
        return original(pin_memory=False)

    setattr(unpinned, _MARK, True)
    transformer_impl.CPUOffloadPolicy = unpinned  # type: ignore[attr-defined]
