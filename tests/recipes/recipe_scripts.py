"""The recipes' scripts, loaded by path (those of several recipes have the same names), and a run
directory for them that needs no engine."""

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from pivottrace_verl.pool import RunDir
from pivottrace_verl.schemas import SCORE_SCHEMA

ROLLOUTS = 8
RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def load(name: str) -> ModuleType:
    """A script such as `smollm2/table`, under a module name of its own."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where dataclasses look up the module of a class.
    sys.modules[spec.name] = module
    path = list(sys.path)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = path
    return module


def make_model(folder: Path) -> Path:
    """A folder that passes for a model's where none is loaded."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "w.safetensors").write_bytes(b"w" * 100)
    return folder


def invent_scores(run: RunDir, truth: Mapping[str, str]) -> None:
    """Prompt i of P is right in ever fewer rollouts, and more uncertain; `truth` is the answer by
    the text of the last message."""
    pool = run.pool()
    rows: list[dict[str, Any]] = []
    for i, prompt in enumerate(pool):
        right = round(ROLLOUTS * (1 - i / len(pool)))
        counts = [(truth[prompt.messages[-1]["content"]], right), ("-1", ROLLOUTS - right)]
        clusters = sorted(
            ({"answer": a, "count": c} for a, c in counts if c), key=lambda c: -c["count"]
        )
        given = {
            "pt_id": prompt.pt_id,
            "n_rollouts": ROLLOUTS,
            "answers": clusters,
            "majority": None if 2 * right == ROLLOUTS else clusters[0]["answer"],
            "length_mean": 30.0,
            "logprob_mean": -0.5,
            "rollouts": [],
        }
        rest = {field.name: 0 for field in SCORE_SCHEMA if field.name not in given}
        rest |= {name: float(i) for name in rest if name.startswith("uncertainty/")}
        rows.append({**rest, **given})
    run.write_score_part(0, rows)
    run.merge_scores()
