"""The two entry points through which verl and vLLM meet this package.

Installed and not asked for, both return without importing anything. What asks for something:

- `VERL_PLATFORM=cpu` turns the CPU platform on (`pivottrace_verl.cpu`). It is a switch of its own
  and stays in force under the kill switch: without it verl cannot run on such a machine at all.
- `PIVOTTRACE_CAPTURE` turns the attention capture on inside vLLM's processes.
- `PIVOTTRACE_DISABLE=1` is the kill switch of everything but the CPU platform.

verl swallows an exception of a plugin and logs it at DEBUG, where nobody looks; an entry point that
fails here says so on stderr, with its traceback, and raises. `STATE` is what `pivottrace doctor`
reads: for each entry point how often it ran in this process, what it installed and its error.
"""

import os
import sys
import traceback
from collections.abc import Callable
from typing import TypedDict

from pivottrace_verl.errors import PivotTraceError


class EntryState(TypedDict):
    """What one entry point did in this process."""

    calls: int
    installed: list[str]
    error: str | None


STATE: dict[str, EntryState] = {
    "verl": {"calls": 0, "installed": [], "error": None},
    "vllm": {"calls": 0, "installed": [], "error": None},
}


def disabled() -> bool:
    """True when the kill switch `PIVOTTRACE_DISABLE=1` is set."""
    return os.environ.get("PIVOTTRACE_DISABLE", "") == "1"


def cpu_platform_requested() -> bool:
    """True when `VERL_PLATFORM=cpu` asks for verl's CPU platform."""
    return os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"


def register_verl() -> None:
    """Register the CPU platform with verl if `VERL_PLATFORM=cpu`; safe to call again."""
    _run("verl", _install_verl)


def register_vllm() -> None:
    """Install vLLM's CPU shim and the attention capture, each if asked for; safe to call again."""
    _run("vllm", _install_vllm)


def _install_verl() -> list[str]:
    if not cpu_platform_requested():
        return []
    from pivottrace_verl.cpu.verl_shims import install

    return install()


def _install_vllm() -> list[str]:
    installed = []
    if cpu_platform_requested():
        from pivottrace_verl.cpu.vllm_shims import install as install_cpu

        installed += install_cpu()
    if os.environ.get("PIVOTTRACE_CAPTURE") and not disabled():
        from pivottrace_verl.attention.vllm_hooks import install as install_capture

        install_capture()
        installed.append("capture")
    return installed


def _run(name: str, install: Callable[[], list[str]]) -> None:
    """Run an entry point and keep its record; a failure is printed before it is raised."""
    state = STATE[name]
    state["calls"] += 1
    try:
        for what in install():
            if what not in state["installed"]:
                state["installed"].append(what)
    except Exception as error:
        state["error"] = f"{type(error).__name__}: {error}"
        sentence = (
            f"The {name} entry point of pivottrace-verl failed in process {os.getpid()}, "
            f"so what it should install is missing: {state['error']}"
        )
        print(f"{sentence}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        raise PivotTraceError(sentence) from error
    state["error"] = None
