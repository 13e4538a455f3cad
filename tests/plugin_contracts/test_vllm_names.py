"""The private names of vLLM that the attention capture leans on exist in the installed vLLM."""

import importlib
import inspect
import re
from functools import reduce
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

from pivottrace_verl.attention.vllm_names import NAMES, Name

vllm = pytest.importorskip("vllm")


def has_field(owner: Any, name: str) -> bool:
    """A class attribute, a dataclass or msgspec field, or an annotation, of any base."""
    if hasattr(owner, name):
        return True
    return any(name in vars(base).get("__annotations__", {}) for base in owner.__mro__)


def sets_on_self(owner: type, name: str) -> bool:
    """`self.name` is assigned, or declared, in the class or one of its bases."""
    wanted = re.compile(rf"\bself\.{name}\b\s*(:|=[^=]|,)")
    bases = [base for base in owner.__mro__ if base.__module__.startswith("vllm")]
    return any(wanted.search(inspect.getsource(base)) for base in bases)


def problem(name: Name) -> str | None:
    """Why a name does not hold in the installed vLLM, or None."""
    module_name, _, path = name.path.partition(":")
    told = f"vLLM {vllm.__version__}: {name.path} ({name.why}; upstream {name.upstream})"
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        return f"{told} cannot be imported: {error}."
    *owners, last = path.split(".")
    try:
        owner = reduce(getattr, owners, module)
    except AttributeError as error:
        return f"{told} has lost its owner: {error}."
    if name.instance:
        return None if sets_on_self(owner, last) else f"{told} is not set on instances any more."
    if inspect.isclass(owner) and not has_field(owner, last):
        return f"{told} does not exist any more."
    if not inspect.isclass(owner) and not hasattr(owner, last):
        return f"{told} does not exist any more."
    if name.parameters:
        found = tuple(inspect.signature(getattr(owner, last)).parameters)
        if found[: len(name.parameters)] != name.parameters:
            return f"{told} takes {found}, not {name.parameters}, as its first parameters."
    return None


HERE = [name for name in NAMES if SpecifierSet(name.versions).contains(vllm.__version__)]


@pytest.mark.parametrize("name", HERE, ids=lambda name: name.path.partition(":")[2])
def test_every_private_name_exists_with_its_parameters(name: Name) -> None:
    assert problem(name) is None, problem(name)


def test_a_name_that_moved_is_told_with_its_reason() -> None:
    moved = Name("vllm.v1.worker.gpu_input_batch:InputBatch.gone", "batch order", "its file")
    assert "does not exist any more" in str(problem(moved))
    assert "batch order" in str(problem(moved))
    changed = Name(
        "vllm.v1.worker.worker_base:WorkerWrapperBase.initialize_from_config",
        "the moment",
        "its file",
        ("self", "other"),
    )
    assert "not ('self', 'other')" in str(problem(changed))
    unset = Name("vllm.v1.worker.gpu_model_runner:GPUModelRunner.no_such", "x", "y", instance=True)
    assert "not set on instances" in str(problem(unset))
