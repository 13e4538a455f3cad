"""The private names of verl that training leans on hold in what is installed."""

import importlib
import inspect
import os
import subprocess
import sys
from functools import reduce
from importlib.metadata import version
from pathlib import Path

import pytest

from pivottrace_verl.training.names import NAMES, VERL, Name

pytest.importorskip("verl")


def problem(name: Name) -> str | None:
    """Why a name does not hold, or None."""
    module, _, path = name.path.partition(":")
    try:
        found = reduce(getattr, path.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        return f"{name.path} does not exist any more ({name.why}): {error}."
    if name.parameters is not None:
        takes = tuple(inspect.signature(found).parameters)
        if takes[: len(name.parameters)] != name.parameters:
            return f"{name.path} takes {takes}, not {name.parameters} first ({name.why})."
    return None


def test_the_installed_verl_is_the_one_these_names_were_read_in() -> None:
    assert version("verl") == VERL


def test_every_private_name_exists_with_its_parameters() -> None:
    # In a process of its own: verl chooses its platform once, on import.
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import test_training_names as contract\n"
        "print('\\n'.join(filter(None, map(contract.problem, contract.NAMES))))\n"
        "print('checked', len(contract.NAMES))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(Path(__file__).parent)],
        env={**os.environ, "VERL_PLATFORM": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = [line for line in done.stdout.splitlines() if "any more" in line or "first (" in line]
    assert not told, "\n".join(told)
    assert f"checked {len(NAMES)}" in done.stdout


def test_a_name_that_moved_is_reported_with_its_reason() -> None:
    gone = Name("verl.trainer.main_ppo:run_elsewhere", "starts the job")
    assert "does not exist any more (starts the job)" in str(problem(gone))
    changed = Name("verl.trainer.main_ppo:run_ppo", "starts the job", ("other",))
    assert "not ('other',) first" in str(problem(changed))
