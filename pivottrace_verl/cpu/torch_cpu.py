"""`torch.cpu` with the functions that verl expects of a device module.

verl calls `get_torch_device().empty_cache()` and a dozen more of the functions that `torch.cuda`
has and `torch.cpu` of torch 2.13 lacks (`verl/utils/memory_utils.py`, `verl/utils/fsdp_utils.py`,
`verl/workers/engine_workers.py`). torch itself is left as it is: verl is given this module, which
answers those names and hands every other one to `torch.cpu`. Memory is in bytes.
"""

import resource
from typing import Any

import psutil
import torch


def __getattr__(name: str) -> Any:
    """Everything that torch.cpu has itself (`synchronize`, `Stream`, `device_count`, ...)."""
    return getattr(torch.cpu, name)


def memory_allocated(device: object = None) -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def max_memory_allocated(device: object = None) -> int:
    """Peak resident memory of this process since it started."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_reserved(device: object = None) -> int:
    """The same as allocated: the C allocator does not tell the two apart."""
    return memory_allocated(device)


def max_memory_reserved(device: object = None) -> int:
    """The same as the peak allocated."""
    return max_memory_allocated(device)


def mem_get_info(device: object = None) -> tuple[int, int]:
    """Memory of the machine: (available, total)."""
    memory = psutil.virtual_memory()
    return int(memory.available), int(memory.total)


def get_device_name(device: object = None) -> str:
    """What verl's FLOPs counter looks up; it knows no CPU and falls back to an infinite peak."""
    return "CPU"


def get_rng_state(device: object = None) -> torch.Tensor:
    """State of the one generator that the CPU has."""
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, device: object = None) -> None:
    """Set the state of the one generator that the CPU has."""
    torch.set_rng_state(state)


def manual_seed(seed: int) -> None:
    """Seed the one generator that the CPU has."""
    torch.default_generator.manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    """Seed the one generator that the CPU has."""
    torch.default_generator.manual_seed(seed)


def empty_cache() -> None:
    """Nothing to empty: the C allocator keeps no cache that torch could return."""


def ipc_collect() -> None:
    """Nothing to collect: tensors travel through shared memory."""


def reset_peak_memory_stats(device: object = None) -> None:
    """The kernel's peak of a process cannot be reset."""
