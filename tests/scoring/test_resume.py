"""Scoring that is killed and run again ends with the same bytes as scoring that is left alone.

Real engines on a tiny random model, in processes of their own. The prompts share a long beginning,
which the engine would keep between parts, and hidden states are read as well.
"""

import json
import math

import pytest

from pivottrace_verl.estimators import ESTIMATORS
from pivottrace_verl.pool import RunDir
from pivottrace_verl.schemas import SCORE_SCHEMA
from pivottrace_verl.scoring import TIMINGS
from pivottrace_verl.traces import FEATURE_NAMES
from tests.scoring.scored_run import init_runs, kill_after_first_part, pivottrace

pytestmark = pytest.mark.vllm

PROMPTS, PARTS, ROLLOUTS = 15, 3, 4
BEGINNING = " ".join(f"w{i}" for i in range(100, 240, 2))
SCORE = (
    "--rollouts", ROLLOUTS, "--max-prompt-tokens", 96, "--max-tokens", 96,
    "--part-size", PROMPTS // PARTS, "--hidden-states",
)  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    prompts = [f"{BEGINNING} {2 * i + 9} +" for i in range(PROMPTS)]
    init_runs(folder, ("whole", "killed"), prompts)
    pivottrace("score", folder / "whole", *SCORE)
    return folder


@pytest.fixture(scope="module")
def resumed(work):
    """The other run: killed when its first part is there, then run again."""
    kill_after_first_part(work / "killed", *SCORE)
    assert len(RunDir.open(work / "killed").finished_parts()) < PARTS
    pivottrace("score", work / "killed", *SCORE)
    return work / "killed"


def test_a_killed_and_resumed_run_has_the_bytes_of_an_uninterrupted_one(work, resumed):
    whole = work / "whole"
    names = [f"scores/part-{i:05d}.parquet" for i in range(PARTS)]
    for name in (*names, "scores.parquet", "traces/part-00000.safetensors",
                 "traces/part-00000.json"):  # fmt: skip
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name


def test_the_manifests_are_the_same_but_for_the_timings_and_the_counts(work, resumed):
    manifests = [
        json.loads((run / "manifest.json").read_text()) for run in (work / "whole", resumed)
    ]
    for manifest in manifests:
        seconds = manifest.pop("timings")
        assert set(TIMINGS) < set(seconds)
        assert all(seconds[name] > 0 for name in TIMINGS if name != "score_replay")
        # Like the timings, of the parts that were written before the process was killed.
        assert not any(n for name, n in manifest.pop("traces").items() if name != "received")
    assert manifests[0] == manifests[1]
    assert {"detector", "variants", "forks"} <= set(manifests[0])


def test_every_estimator_and_every_feature_is_known_of_every_prompt(work):
    table = RunDir.open(work / "whole").scores()
    assert table.schema.names == SCORE_SCHEMA.names
    rows = table.to_pylist()
    assert len(rows) == PROMPTS
    for row in rows:
        assert all(rollout["traced"] for rollout in row["rollouts"])
        for name in [f"uncertainty/{n}" for n in ESTIMATORS] + [
            f"features/{n}" for n in FEATURE_NAMES
        ]:
            assert row[name] is not None and math.isfinite(row[name]), name
        assert row["timed_out"] == 0
        assert row["uncertainty/nll"] == pytest.approx(-row["logprob_mean"])
        certainties = [rollout["self_certainty"] for rollout in row["rollouts"]]
        assert row["uncertainty/self_certainty"] == pytest.approx(-sum(certainties) / ROLLOUTS)
        assert min(certainties) > 0
    assert len({row["uncertainty/coe"] for row in rows}) == PROMPTS


def test_scoring_a_scored_run_again_changes_nothing(work):
    before = (work / "whole" / "scores.parquet").stat()
    manifest = json.loads((work / "whole" / "manifest.json").read_text())
    pivottrace("score", work / "whole", *SCORE)
    after = json.loads((work / "whole" / "manifest.json").read_text())
    assert {n: after["timings"][n] for n in TIMINGS} == {n: manifest["timings"][n] for n in TIMINGS}
    assert (work / "whole" / "scores.parquet").stat().st_size == before.st_size
