"""The GPU recipe's configuration composes and is one that our checks accept."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from pivottrace_verl.errors import PivotTraceError

main_ppo = pytest.importorskip("pivottrace_verl.training.main_ppo", reason="verl is not installed")

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "dapo_math_qwen3_4b"


def composed(*more: str) -> Any:
    """The configuration as Hydra makes it of the words that the recipe passes on."""
    words = [
        "actor_rollout_ref.model.path=/models/Qwen3-4B-Base",
        "data.train_batch_size=128",
        "actor_rollout_ref.rollout.n=8",
        "actor_rollout_ref.rollout.calculate_log_probs=True",
        "pivottrace.detector.tau=0.05",
        f"hydra.searchpath=[pkg://verl.trainer.config,file://{RECIPE / 'config'}]",
        "+recipe=dapo_math_qwen3_4b",
        *more,
    ]
    job = subprocess.run(
        [sys.executable, "-m", "pivottrace_verl.training.main_ppo", *words, "--cfg", "job"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "VERL_PLATFORM": "cpu"},
    )
    assert job.returncode == 0, job.stderr[-3000:]
    # What libraries print comes before the configuration.
    return OmegaConf.create(job.stdout[re.search(r"^\w+:$", job.stdout, re.M).start() :])


@pytest.fixture(scope="module")
def recipe() -> Any:
    return composed()


def test_the_recipe_composes_and_passes_the_checks(recipe: Any) -> None:
    main_ppo.check(recipe)
    assert recipe.actor_rollout_ref.actor.clip_ratio_high == 0.28
    assert recipe.pivottrace.curriculum.min_annotate_share == 0.25
    assert recipe.pivottrace.vote.min_agreement == 0.25
    # Capture needs no eager mode, which would cost most of vLLM's decoding speed.
    assert recipe.actor_rollout_ref.rollout.enforce_eager is False


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pivottrace.vote.kind": "most"}, "kind is 'most'"),
        ({"pivottrace.vote.kind": "weighted", "pivottrace.vote.weight": "pivots",
          "pivottrace.capture.enable": False}, "no rollout's pivots"),
        ({"pivottrace.vote.kind": "weighted",
          "actor_rollout_ref.rollout.calculate_log_probs": False}, "calculate_log_probs=true"),
        ({"pivottrace.weights.policy": "scheduled"}, "self_train_end and steps"),
        ({"pivottrace.curriculum.order": "best"}, "order is 'best'"),
        ({"pivottrace.guard.window": 3}, "window is 3"),
        ({"pivottrace.retriage.enable": True}, "names no run directory"),
    ],
)  # fmt: skip
def test_settings_of_ours_that_cannot_be_are_refused_before_anything_starts(
    recipe: Any, change: dict[str, Any], said: str
) -> None:
    config = OmegaConf.create(OmegaConf.to_container(recipe, resolve=False))
    for name, value in change.items():
        OmegaConf.update(config, name, value)
    with pytest.raises(PivotTraceError, match=said):
        main_ppo.check(config)


def test_the_launch_script_passes_on_the_words_that_were_composed_here() -> None:
    script = (RECIPE / "run.sh").read_text()
    assert "+recipe=dapo_math_qwen3_4b" in script
    assert '"hydra.searchpath=[pkg://verl.trainer.config,file://$here/config]"' in script
    checked = subprocess.run(["bash", "-n", str(RECIPE / "run.sh")], check=False)
    assert checked.returncode == 0
