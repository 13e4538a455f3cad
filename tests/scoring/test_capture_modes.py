"""Where traces come from changes no rollout: captured and replayed ones are the same, and without
any what needs none is scored."""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import load_file

from pivottrace_verl.attention.channel import Trace
from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.attention.replay import compare
from pivottrace_verl.estimators import ESTIMATORS, NEED_TRACES
from pivottrace_verl.pool import RunDir
from pivottrace_verl.traces import FEATURE_NAMES
from tests.scoring.scored_run import init_runs, kill_after_first_part, pivottrace

pytestmark = pytest.mark.vllm

PROMPTS, PARTS, ROLLOUTS = 12, 3, 4
NEED_NO_TRACE = ("consistency", "length", "nll", "random")
SCORE = (
    "--rollouts", ROLLOUTS, "--max-prompt-tokens", 96, "--max-tokens", 96,
    "--part-size", PROMPTS // PARTS,
)  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modes")
    prompts = [" ".join(f"w{j}" for j in range(100, 104 + 12 * i, 2)) for i in range(PROMPTS)]
    init_runs(folder, ("on", "replay", "killed", "off"), prompts)
    pivottrace("score", folder / "on", *SCORE)
    said = pivottrace("score", folder / "replay", "--capture", "replay", *SCORE)
    assert f"{PROMPTS * ROLLOUTS} of {PROMPTS * ROLLOUTS} rollouts traced" in said
    # Also with the switch that forbids capture.
    said = pivottrace("score", folder / "off", "--capture", "off", *SCORE, PIVOTTRACE_DISABLE="1")
    assert "rollouts traced" not in said and "--estimator consistency" in said
    return folder


def rows_of(run):
    return RunDir.open(run).scores().to_pylist()


def test_replayed_traces_are_the_captured_ones(work):
    tensors = [
        load_file(work / name / "traces/part-00000.safetensors") for name in ("on", "replay")
    ]
    assert tensors[0].keys() == tensors[1].keys() and len(tensors[0]) == 2 * 2 * PROMPTS // PARTS
    texts = [
        json.loads((work / n / "traces/part-00000.json").read_text()) for n in ("on", "replay")
    ]
    assert texts[0] == texts[1]
    config = CaptureConfig()
    for name in texts[0]:
        captured, replayed = (
            Trace(name, t[name], t[f"{name}/token_entropy"], t[f"{name}/token_entropy"])
            for t in tensors
        )
        errors = compare(captured, replayed, config)
        assert max(errors.values()) < 1e-4, errors


def test_the_scores_of_a_replay_are_those_of_the_capture(work):
    pivots = []
    for captured, replayed in zip(rows_of(work / "on"), rows_of(work / "replay"), strict=True):
        assert captured["answers"] == replayed["answers"]
        for name in NEED_NO_TRACE:
            assert captured[f"uncertainty/{name}"] == replayed[f"uncertainty/{name}"]
        for name in ("entropy", "self_certainty", "entropy_forks"):
            assert captured[f"uncertainty/{name}"] == pytest.approx(
                replayed[f"uncertainty/{name}"], abs=2e-3
            )
        for ours, theirs in zip(captured["rollouts"], replayed["rollouts"], strict=True):
            for name in ("seed", "answer", "n_tokens", "truncated", "logprob", "traced"):
                assert ours[name] == theirs[name]
            assert ours["entropy"] == pytest.approx(theirs["entropy"], abs=1e-4)
            pivots.append((ours["pivots"], theirs["pivots"]))
    ours, theirs = np.array(pivots).T
    # A change that equals tau may fall on either side.
    assert ours.sum() > 50 and np.abs(ours - theirs).max() <= 1
    assert np.mean(ours == theirs) >= 0.9
    taus = [RunDir.open(work / name).manifest["detector"]["tau"] for name in ("on", "replay")]
    assert taus[0] == pytest.approx(taus[1], abs=1e-4)


def test_without_traces_what_needs_none_is_scored(work):
    for captured, row in zip(rows_of(work / "on"), rows_of(work / "off"), strict=True):
        for name in ESTIMATORS:
            known = math.isfinite(row[f"uncertainty/{name}"])
            assert known == (name in NEED_NO_TRACE), name
            assert not known or row[f"uncertainty/{name}"] == captured[f"uncertainty/{name}"]
        assert all(math.isnan(row[f"features/{name}"]) for name in FEATURE_NAMES)
        assert not any(rollout["traced"] for rollout in row["rollouts"])
        assert row["answers"] == captured["answers"]
    manifest = RunDir.open(work / "off").manifest
    assert "detector" not in manifest and not (work / "off" / "traces").exists()
    pivottrace("probe", work / "off", "--estimator", "consistency", "--n", 4)
    said = pivottrace("probe", work / "off", "--n", 4, status=2)
    assert "'pivot_density' is not scored" in said and "--capture replay" in said
    assert "pivot_density" in NEED_TRACES
    pivottrace("report", work / "off")


def test_an_engine_that_cannot_capture_is_told_with_what_helps(work):
    log = pivottrace("score", work / "killed", "--layers", 99, *SCORE, status=2).splitlines()
    (told,) = (line for line in log if line.startswith("error: "))
    assert "did not start with attention capture on" in told and "--capture replay" in told
    assert any("asks for layer 99" in line for line in log)
    # The same layers in a replay are refused before anything starts.
    words = ("--layers", 99, "--capture", "replay", *SCORE)
    assert "error: capture.layers asks for layer 99" in pivottrace(
        "score", work / "killed", *words, status=2
    )


def test_a_replay_goes_on_by_part_and_no_part_is_made_another_way(work):
    killed, whole = work / "killed", work / "replay"
    kill_after_first_part(killed, "--capture", "replay", *SCORE)
    said = pivottrace("score", killed, *SCORE, status=2)
    assert "score.capture: 'replay' on disk, 'on' asked for" in said
    pivottrace("score", killed, "--capture", "replay", *SCORE)
    for name in ("scores.parquet", "traces/part-00000.safetensors", "traces/part-00000.json"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), name


def test_the_manifest_says_where_the_traces_came_from_and_what_was_lost(work):
    on, replay = (RunDir.open(work / name).manifest for name in ("on", "replay"))
    assert [m["settings"]["score"]["score"]["capture"] for m in (on, replay)] == ["on", "replay"]
    assert on["traces"].pop("received") == PROMPTS * ROLLOUTS
    assert not any(on["traces"].values()) and "traces" not in replay
    assert replay["timings"]["score_replay"] > 0 == on["timings"]["score_replay"]
