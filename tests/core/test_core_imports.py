"""The pure core stays light: it must load on a machine that has neither torch nor vLLM."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = ["torch", "ray", "vllm", "verl", "transformers", "transfer_queue", "math_verify", "sympy"]


@pytest.mark.parametrize(
    "room", ["annotation.oracle", "answers", "curriculum", "pivots", "traces", "triage"]
)
def test_importing_the_core_loads_nothing_heavy(room):
    code = f"import sys, pivottrace_verl.{room}\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip() == "[]"
