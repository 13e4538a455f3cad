"""Change a module right after it is imported, without importing it now.

verl's entry point runs in every process that imports verl, and most of them never load the training
engine. A shim of the engine waits here until the process that needs it imports it.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

Change = Callable[[ModuleType], None]


def after_import(name: str, change: Change) -> None:
    """Call `change(module)` once module `name` is executed, at once if it already is.

    An exception of `change` fails the import. A second change of the same module follows the first.
    """
    module = sys.modules.get(name)
    if module is not None:
        change(module)
        return
    for finder in sys.meta_path:
        if isinstance(finder, _Waiting):
            finder.changes.setdefault(name, []).append(change)
            return
    waiting = _Waiting()
    waiting.changes[name] = [change]
    sys.meta_path.insert(0, waiting)


class _Waiting(MetaPathFinder):
    """First in line for the names it waits for; finds each where Python finds its files."""

    def __init__(self) -> None:
        self.changes: dict[str, list[Change]] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.changes:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Changing(spec.loader, self.changes[name])
        return spec


class _Changing(Loader):
    """Runs the module's own loader, then the changes."""

    def __init__(self, loader: Loader, changes: list[Change]) -> None:
        self._loader = loader
        self._changes = changes

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # inspect.getsource and tracebacks ask the module for its real loader.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        for change in self._changes:
            change(module)
