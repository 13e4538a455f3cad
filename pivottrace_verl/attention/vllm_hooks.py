"""Where capture enters vLLM, and when.

`install` (from the `vllm.general_plugins` entry point, in every process of vLLM) wraps one class
method, `WorkerWrapperBase.initialize_from_config`. When a worker has its KV cache, and the
environment asks for capture, `cpu_capture.Capture` wraps instance attributes of that worker only.
Set-ups that cannot be captured stop the engine at start with a sentence.
"""

import functools
import logging
import os
import weakref
from typing import Any

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
from pivottrace_verl.attention.support import check_engine, find_layers, find_witness, own_place

logger = logging.getLogger(__name__)

_MARK = "_pivottrace"
_captures: "weakref.WeakSet[Capture]" = weakref.WeakSet()


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


def _asked_for() -> bool:
    return bool(os.environ.get(ENV_CAPTURE)) and os.environ.get(ENV_DISABLE) != "1"


def attach(wrapper: Any, kv_cache_config: Any) -> Capture | None:
    """Start capturing in a worker whose KV cache was just made; None if this worker has neither a
    traced layer nor the logits.

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
    check_engine(wrapper.vllm_config, runner)
    place = own_place()
    layers = find_layers(wrapper.vllm_config, kv_cache_config, config, place)
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
    capture = Capture(runner, kv_cache_config, layers, groups, config, sender, place, part, witness)
    capture.wrap()
    _captures.add(capture)
    info = capture.describe()
    logger.info("PivotTrace captures attention: %s", info)
    sender.hello(info)
    return capture
