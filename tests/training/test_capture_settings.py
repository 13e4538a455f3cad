"""What a run captures while scoring is what its rollout servers capture while training."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.training.launch import TrainConfig, _hydra, overrides
from tests.triaged_run import make_run, note_scoring


@pytest.mark.parametrize(
    "capture", [CaptureConfig(), CaptureConfig(layers=(3, 1), heads=((0, 2), (1,)), window=16)]
)
def test_layers_and_heads_of_a_manifest_reach_the_rollout_servers(capture):
    kept = json.loads(capture.to_json())
    words = [f"pivottrace.capture.{name}={_hydra(value)}" for name, value in kept.items()]
    folder = str(files("pivottrace_verl.training") / "config")
    with initialize_config_dir(folder, version_base=None):
        config = compose("pivottrace_trainer", overrides=words)
    custom = config.actor_rollout_ref.rollout.custom["pivottrace"]
    settings = OmegaConf.to_container(custom, resolve=True)["capture"]
    del settings["enable"], settings["timeout_s"]
    assert CaptureConfig.from_dict(settings) == capture


@pytest.mark.parametrize(("mode", "enable"), [(None, "true"), ("on", "true"), ("replay", "false")])
def test_where_scoring_could_not_capture_training_does_not_try(
    tmp_path: Path, mode: str | None, enable: str
) -> None:
    run = make_run(tmp_path)
    note_scoring(run)
    score = run.manifest["settings"]["score"]
    if mode is not None:
        score["score"]["capture"] = mode
    run.update_manifest(settings={"score": score})
    words = dict(w.split("=", 1) for w in overrides(run, TrainConfig(), tmp_path / "m"))
    assert words["pivottrace.capture.enable"] == enable
    assert words["pivottrace.detector.tau"] == "0.05"


def test_a_run_without_traces_has_no_detector_and_trains_without_capture(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    note_scoring(run)
    manifest = run.manifest
    del manifest["detector"]
    manifest["settings"]["score"]["score"]["capture"] = "off"
    (run.path / "manifest.json").write_text(json.dumps(manifest))
    words = dict(w.split("=", 1) for w in overrides(run, TrainConfig(), tmp_path / "m"))
    assert words["pivottrace.capture.enable"] == "false"
    assert not [name for name in words if name.startswith("pivottrace.detector")]
