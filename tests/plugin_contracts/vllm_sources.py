"""Private names of vLLM looked up in its sources, without importing them."""

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from packaging.specifiers import SpecifierSet

from pivottrace_verl.attention.vllm_names import Name

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """A folder that holds the package `vllm`, and its version."""

    root: Path
    version: str

    @classmethod
    def unpacked(cls, root: Path) -> "Source":
        """Of an unpacked wheel; ValueError if it is none."""
        infos = sorted(root.glob("vllm*.dist-info"))
        if not (root / "vllm" / "__init__.py").is_file() or len(infos) != 1:
            raise ValueError(f"{root} is no unpacked wheel of vLLM: no vllm/ and one dist-info.")
        return cls(root, infos[0].name.removesuffix(".dist-info").partition("-")[2])

    def has(self, name: Name) -> bool:
        return SpecifierSet(name.versions).contains(self.version, prereleases=True)

    def problem(self, name: Name) -> str | None:
        """Why a name does not hold here, or None."""
        told = f"vLLM {self.version}: {name.path} ({name.why})"
        module, _, path = name.path.partition(":")
        *owners, last = path.split(".")
        if not owners:
            found = self._top(module, last)
            nodes = [] if found is None else [found[1]]
        else:
            bases = self._bases(module, owners[0])
            if not bases:
                return f"{told}: there is no class {owners[0]} any more."
            if name.instance:
                set_here = any(_sets_on_self(base, last) for base in bases)
                return None if set_here else f"{told} is not set on instances any more."
            nodes = [node for base in bases for node in base.body if last in _names_of(node)]
        if not nodes:
            return f"{told} does not exist any more."
        functions = [n for n in nodes if isinstance(n, Function)]
        if name.parameters:
            found_names = tuple(a.arg for a in functions[0].args.args) if functions else ()
            if found_names[: len(name.parameters)] != name.parameters:
                return f"{told} takes {found_names}, not {name.parameters}, as first parameters."
        if name.mentions and name.mentions not in ast.unparse(nodes[0]):
            return f"{told} does not say `{name.mentions}` any more."
        if name.assigns:
            variable = name.assigns[0].partition(" = ")[0]
            found = _assigned(nodes[0], variable)
            for gone in sorted(set(name.assigns) - found):
                return f"{told} does not say `{gone}` any more."
            for new in sorted(found - set(name.assigns)):
                return f"{told} gives `{variable}` a value in a way that is not known: `{new}`."
        return None

    def _file(self, module: str) -> Path | None:
        path = self.root.joinpath(*module.split("."))
        files = (path.with_suffix(".py"), path / "__init__.py")
        return next((file for file in files if file.is_file()), None)

    def _top(self, module: str, name: str) -> tuple[str, ast.stmt] | None:
        """The statement that defines a module's name, followed through imports, and its module."""
        file = self._file(module)
        if file is None:
            return None
        for node in ast.walk(_parsed(file)):
            if isinstance(node, ast.ClassDef | Function) and node.name == name:
                return module, node
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                for alias in node.names:
                    if (alias.asname or alias.name) == name and node.module:
                        return self._top(node.module, alias.name)
        return None

    def _bases(self, module: str, name: str) -> list[ast.ClassDef]:
        """A class and its bases, as far as they are vLLM's."""
        found = self._top(module, name)
        if found is None or not isinstance(found[1], ast.ClassDef):
            return []
        home, node = found
        bases = [node]
        for base in node.bases:
            # Generic[T] and the like are no names; a base's parameters do not matter.
            plain = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(plain, ast.Name) and plain.id != name:
                bases += self._bases(home, plain.id)
        return bases


@cache
def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _names_of(node: ast.stmt) -> set[str]:
    """What a statement of a class body defines."""
    if isinstance(node, ast.ClassDef | Function):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _assigned(function: ast.stmt, variable: str) -> set[str]:
    """The assignments to a local variable."""
    return {
        ast.unparse(node)
        for node in ast.walk(function)
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.NamedExpr)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        for name in ast.walk(target)
        if isinstance(name, ast.Name) and name.id == variable and isinstance(name.ctx, ast.Store)
    }


def _sets_on_self(owner: ast.ClassDef, name: str) -> bool:
    """`self.name` is assigned somewhere in the class."""
    return any(
        isinstance(node, ast.Attribute)
        and node.attr == name
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
        for node in ast.walk(owner)
    )
