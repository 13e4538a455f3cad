"""What a run captures while scoring is what its rollout servers capture while training."""

import json
from importlib.resources import files

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.training.launch import _hydra


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
