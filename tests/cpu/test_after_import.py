"""A change waits for the module it is about, and the module stays an ordinary one."""

import importlib
import importlib.util
import inspect
import itertools
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pivottrace_verl.cpu.after_import import after_import

NUMBER = itertools.count()


@pytest.fixture
def module_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that exists on disk and is not imported yet."""
    name = f"waiting_{next(NUMBER)}"
    (tmp_path / f"{name}.py").write_text("value = 1\n\n\ndef twice(x):\n    return 2 * x\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return name


def add_ten(module: ModuleType) -> None:
    module.value += 10  # type: ignore[attr-defined]


def test_nothing_is_imported_until_somebody_asks(module_name: str) -> None:
    after_import(module_name, add_ten)
    assert module_name not in sys.modules
    assert importlib.import_module(module_name).value == 11


def test_a_module_that_is_there_is_changed_at_once(module_name: str) -> None:
    module = importlib.import_module(module_name)
    after_import(module_name, add_ten)
    assert module.value == 11


def test_two_changes_of_one_module_happen_in_their_order(module_name: str) -> None:
    after_import(module_name, add_ten)
    after_import(module_name, lambda module: setattr(module, "value", module.value * 2))
    assert importlib.import_module(module_name).value == 22


def test_the_module_keeps_its_loader_and_source(module_name: str) -> None:
    after_import(module_name, add_ten)
    module = importlib.import_module(module_name)
    assert inspect.getsource(module.twice) == "def twice(x):\n    return 2 * x\n"
    assert module.__spec__.loader is module.__loader__
    assert importlib.reload(module).value == 11


def test_a_look_without_an_import_leaves_the_change_waiting(module_name: str) -> None:
    after_import(module_name, add_ten)
    assert importlib.util.find_spec(module_name) is not None
    assert importlib.import_module(module_name).value == 11


def test_a_module_that_does_not_exist_stays_an_import_error() -> None:
    after_import("no_such_module_anywhere", add_ten)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_module_anywhere")


def test_a_change_that_fails_fails_the_import(module_name: str) -> None:
    def fail(module: ModuleType) -> None:
        raise RuntimeError("no")

    after_import(module_name, fail)
    with pytest.raises(RuntimeError, match="no"):
        importlib.import_module(module_name)
