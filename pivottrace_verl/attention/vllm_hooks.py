"""Where capture enters vLLM, and when.

`install` (from the `vllm.general_plugins` entry point, in every process of vLLM) wraps two class
methods, which act only where the environment asks for capture:

- `WorkerWrapperBase.initialize_from_config`: when a worker has its KV cache, instance attributes of
  that worker only are wrapped, by `device_capture.DeviceCapture` on a GPU, by `cpu_capture.Capture`
  on a CPU. Set-ups that cannot be captured stop the engine at start with a sentence.
- `ParentRequest.get_child_info`, in the process that takes the requests: the children of one with
  n > 1 share its arguments, so each but the first is given a key of its own.
"""

import functools
import logging
import os
import weakref
from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING, Any

from pivottrace_verl.attention.config import (
    ENV_CAPTURE,
    ENV_DISABLE,
    ENV_ENDPOINT,
    ENV_TOKEN,
    EXTRA_ARGS_NAME,
    CaptureConfig,
)
from pivottrace_verl.attention.cpu_capture import Capture
from pivottrace_verl.attention.parts import divide
from pivottrace_verl.attention.sender import Sender
from pivottrace_verl.attention.store import well_formed
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
    """Wrap vLLM's classes once per process; does nothing unless capture is asked for."""
    if not _asked_for():
        return
    from vllm.v1.engine.parallel_sampling import ParentRequest
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    _wrap(WorkerWrapperBase, "initialize_from_config", _attaching)
    _wrap(ParentRequest, "get_child_info", _naming)


def _wrap(owner: type, name: str, wrapping: Callable[[Any], Any]) -> None:
    original = getattr(owner, name)
    if not hasattr(original, _MARK):
        wrapped = functools.wraps(original)(wrapping(original))
        setattr(wrapped, _MARK, True)
        setattr(owner, name, wrapped)


def _attaching(original: Any) -> Any:
    def initialize_from_config(self: Any, kv_cache_configs: list[Any]) -> None:
        original(self, kv_cache_configs)
        if _asked_for():
            attach(self, kv_cache_configs[self.global_rank])

    return initialize_from_config


def _naming(original: Any) -> Any:
    def get_child_info(self: Any, index: int) -> tuple[str, Any]:
        request_id, params = original(self, index)
        return request_id, child_params(params, index) if _asked_for() else params

    return get_child_info


def child_params(params: Any, index: int) -> Any:
    """Sampling parameters of the child `index` of a request with n > 1, whose trace goes by the
    request's key and that of every other child by `key/index`."""
    asked: Any = (params.extra_args or {}).get(EXTRA_ARGS_NAME)
    if index == 0 or not well_formed(asked):
        return params
    params = copy(params)  # without a seed vLLM gives one object to all children
    own = {**asked, "key": f"{asked['key']}/{index}"}
    params.extra_args = {**params.extra_args, EXTRA_ARGS_NAME: own}
    return params


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
