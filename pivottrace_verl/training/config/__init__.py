"""Configuration of the training job; a package, so that Hydra finds it as `pkg://`."""
