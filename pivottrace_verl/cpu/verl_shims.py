"""The lines of verl 0.9.1 that cannot work without a GPU, put right at run time.

Applied by the `verl.plugins` entry point, so in every process that imports verl, before the modules
that take these functions by name are imported. Each has its diff in `patches/`.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

from pivottrace_verl.cpu import distribution

_MARK = "_pivottrace_cpu"


def install() -> list[str]:
    """Apply every shim once; returns the names of those in force.

    Raises whatever the import of verl raises: the caller tells the user.
    """
    from pivottrace_verl.cpu import platform

    platform.register()
    installed = ["platform"]
    # verl registers its FSDP engines for cuda and npu only
    # (verl/workers/engine/fsdp/transformer_impl.py:1143) and offers this variable to choose one
    # (verl/workers/engine/base.py:405); tensors stay where the platform says.
    os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")
    installed.append("engine_device")
    if distribution.install():
        installed.append("distribution_name")
    _shim_process_group()
    installed.append("process_group")
    return installed


def _shim_process_group() -> None:
    """Stand in for verl/utils/distributed.py:88.

    The default backend there is f"cpu:gloo,{device}:{backend}", which for the CPU names one device
    twice ("cpu:gloo,cpu:gloo"); torch refuses that.
    """
    from verl.utils import distributed

    original = distributed.initialize_global_process_group_ray
    if getattr(original, _MARK, False):
        return

    @functools.wraps(original)
    def initialize(timeout_second: float | None = None, backend: str | None = None) -> None:
        original(timeout_second=timeout_second, backend=backend or "gloo")

    distributed.initialize_global_process_group_ray = _marked(initialize)


def _marked(function: Callable[..., Any]) -> Callable[..., Any]:
    setattr(function, _MARK, True)
    return function
