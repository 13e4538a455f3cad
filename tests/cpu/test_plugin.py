"""The entry points do nothing unasked, say what they did, and fail loudly."""

import copy
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pivottrace_verl import plugin
from pivottrace_verl.errors import PivotTraceError


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No switch set, an empty record; both put back."""
    for name in ("VERL_PLATFORM", "PIVOTTRACE_CAPTURE", "PIVOTTRACE_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    before = copy.deepcopy(plugin.STATE)
    for state in plugin.STATE.values():
        state.update(calls=0, installed=[], error=None)
    yield
    plugin.STATE.update(before)


def test_both_entry_points_are_declared() -> None:
    declared = {
        group: {e.value for e in importlib.metadata.entry_points(group=group)}
        for group in ("verl.plugins", "vllm.general_plugins")
    }
    assert "pivottrace_verl.verl_entry" in declared["verl.plugins"]
    assert "pivottrace_verl.plugin:register_vllm" in declared["vllm.general_plugins"]


def test_unasked_nothing_is_imported_or_installed() -> None:
    code = (
        "import sys\n"
        "import pivottrace_verl.verl_entry\n"
        "from pivottrace_verl.plugin import STATE, register_vllm\n"
        "register_vllm()\n"
        "heavy = {'torch', 'verl', 'vllm', 'ray', 'transformers', 'numpy'} & set(sys.modules)\n"
        "print(sorted(heavy), [s['installed'] for s in STATE.values()])\n"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("VERL_", "PIVOTTRACE_"))}
    for switches in ({}, {"VERL_PLATFORM": "nvidia"}, {"PIVOTTRACE_DISABLE": "1"}):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**clean, **switches},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == "[] [[], []]"


def test_the_kill_switch_stops_the_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIVOTTRACE_CAPTURE", "{}")
    monkeypatch.setenv("PIVOTTRACE_DISABLE", "1")
    plugin.register_vllm()
    assert plugin.STATE["vllm"] == {"calls": 1, "installed": [], "error": None}


def test_an_entry_point_that_fails_says_so_and_raises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> list[str]:
        raise ValueError("the moon is in the way")

    monkeypatch.setattr(plugin, "_install_verl", broken)
    with pytest.raises(PivotTraceError, match=r"verl entry point .* ValueError: the moon"):
        plugin.register_verl()
    told = capsys.readouterr().err
    assert "so what it should install is missing" in told and "Traceback" in told
    assert plugin.STATE["verl"]["error"] == "ValueError: the moon is in the way"
    monkeypatch.setattr(plugin, "_install_verl", lambda: ["platform"])
    plugin.register_verl()
    plugin.register_verl()
    assert plugin.STATE["verl"] == {"calls": 3, "installed": ["platform"], "error": None}


def test_a_failure_is_heard_although_verl_hides_it() -> None:
    pytest.importorskip("verl")
    code = (
        "import sys\n"
        "sys.modules['pivottrace_verl.cpu.platform'] = None\n"
        "import verl\n"
        "from pivottrace_verl.plugin import STATE\n"
        "print(STATE['verl']['error'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "VERL_PLATFORM": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "The verl entry point of pivottrace-verl failed" in done.stderr
    assert "ModuleNotFoundError" in done.stdout.splitlines()[-1]
