"""Where capture enters vLLM, and when.

`install` (from the `vllm.general_plugins` entry point, in every process of vLLM) wraps one class
method, `WorkerWrapperBase.initialize_from_config`. When a worker has its KV cache, and the
environment asks for capture, instance attributes of that worker only are wrapped: by
`device_capture.DeviceCapture` on a GPU, by `cpu_capture.Capture` on a CPU. Set-ups that cannot be
captured stop the engine at start with a sentence.
"""

import functools
import logging
import os
import weakref
from typing import TYPE_CHECKING, Any

from pivottrace_verl.attention.config import (
    ENV_CAPTURE,
    ENV_DISABLE,
    ENV_ENDPOINT,
    ENV_TOKEN,
    CaptureConfig,
)
from pivottrace_verl.attention.cpu_capture import Capture
from pivottrace_verl.attention.parts import divide
from pivottrace_verl.attention.sender import Sender
from pivottrace_verl.attention.support import (
    check_engine,
    cpu_problem,
    find_layers,
    find_witness,
    own_place,
)
from pivottrace_verl.attention.task import Task

if TYPE_CHECKING:
    from pivottrace_verl.attention.device_capture import DeviceCapture

logger = logging.getLogger(__name__)

_MARK = "_pivottrace"
_captures: "weakref.WeakSet[Capture | DeviceCapture]" = weakref.WeakSet()


def install() -> None:
    """Wrap the worker class once per process; does nothing unless capture is asked for."""
    if not _asked_for():
        return
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    original = WorkerWrapperBase.initialize_from_config
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def initialize_from_config(self: Any, kv_cache_configs: list[Any]) -> None:
        original(self, kv_cache_configs)
        if _asked_for():
            attach(self, kv_cache_configs[self.global_rank])

    setattr(initialize_from_config, _MARK, True)
    WorkerWrapperBase.initialize_from_config = initialize_from_config


def flush() -> None:
    """Send the traces of this process's engines whose requests have finished.

    Only an in-process engine (VLLM_ENABLE_V1_MULTIPROCESSING=0) needs it: it never tells its
    worker about the last requests that finished. Call it when `generate` has returned.
    """
    for capture in list(_captures):
        capture.flush()


def uses_kernel(runner: Any) -> bool:
    """True where the statistics come from the Triton kernel and not from torch."""
    return bool(runner.device.type != "cpu")


def _asked_for() -> bool:
    return bool(os.environ.get(ENV_CAPTURE)) and os.environ.get(ENV_DISABLE) != "1"


def attach(wrapper: Any, kv_cache_config: Any) -> "Capture | DeviceCapture | None":
    """Start capturing in a worker whose KV cache was just made, before CUDA graphs are captured;
    None if this worker has neither a traced layer nor the logits.

    Raises RuntimeError, which stops the engine, where capture was asked for and cannot be had.
    """
    for name in (ENV_ENDPOINT, ENV_TOKEN):
        if not os.environ.get(name):
            raise RuntimeError(
                f"{ENV_CAPTURE} is set and {name} is not: attention capture needs a receiver, "
                f"started before the engine (pivottrace_verl.attention.channel.Receiver)."
            )
    config = CaptureConfig.from_json(os.environ[ENV_CAPTURE])
    runner = wrapper.worker.model_runner
    on_device = uses_kernel(runner)
    if on_device:
        # Imports Triton, which engines on a CPU do without.
        from pivottrace_verl.attention import device_capture, device_layers

        device_layers.check_device_engine(wrapper.vllm_config, runner)
        problem = device_layers.device_problem(kv_cache_config)
    else:
        check_engine(wrapper.vllm_config, runner)
        problem = cpu_problem(kv_cache_config)
    place = own_place()
    layers = find_layers(wrapper.vllm_config, kv_cache_config, config, place, problem=problem)
    groups = [
        config.choose_heads(layer.n_heads * place.tensor_size, position)
        for position, layer in enumerate(layers)
    ]
    parts = divide([layer.stage for layer in layers], groups, layers[0].n_heads, place)
    part = parts[place.stage * place.tensor_size + place.tensor_rank]
    if part is None:
        return None
    witness = None
    if not part.layers:
        witness = find_witness(wrapper.vllm_config, kv_cache_config, layers[0])
    # One worker that captures everything sends traces and not parts.
    sender = Sender(
        os.environ[ENV_ENDPOINT], os.environ[ENV_TOKEN], config.wire, part if part.of > 1 else None
    )
    task = Task(runner, kv_cache_config, config, layers, groups, place, part, witness)
    capture = device_capture.DeviceCapture(task, sender) if on_device else Capture(task, sender)
    capture.wrap()
    _captures.add(capture)
    info = capture.describe()
    logger.info("PivotTrace captures attention: %s", info)
    sender.hello(info)
    return capture
