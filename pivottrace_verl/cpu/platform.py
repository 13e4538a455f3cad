"""The `PlatformBase` of a machine without a GPU, registered with verl under the name `cpu`.

Stands in for the platform that verl 0.9.1 lacks (`verl/plugin/platform/platform_manager.py:166-173`
knows CUDA, NPU and ROCm). Ray still schedules by the resource `GPU`, of which a run declares one
per worker (`ray_kwargs.ray_init.num_gpus`): verl's placement groups are written for accelerators.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry

from pivottrace_verl.cpu import torch_cpu


class PlatformCPU(PlatformBase):
    """verl's view of the CPU: one device named `cpu`, gloo, no IPC handles, no profiler."""

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> ModuleType:
        return torch_cpu

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        # Never chosen by auto-detection: VERL_PLATFORM=cpu is the only way in.
        return False

    def current_device(self) -> str:  # type: ignore[override]
        # verl writes both f"cpu:{current_device()}" (never on the shared-memory path) and
        # tensor.to(current_device()); an index alone would mean a CUDA device to torch.
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        """Nothing to choose."""

    def synchronize(self, device_index: int | None = None) -> None:
        """Nothing is pending: CPU kernels return when they are done."""

    def manual_seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        """The CPU's allocator has no expandable segments."""

    def empty_cache(self) -> None:
        """Nothing to empty."""

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        """No device profiler."""

    def profiler_stop(self) -> None:
        """No device profiler."""

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> Any:
        return None


def register() -> None:
    """Make `VERL_PLATFORM=cpu` resolve to `PlatformCPU`."""
    PlatformRegistry.register("cpu")(PlatformCPU)
