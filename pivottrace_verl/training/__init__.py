"""Everything that imports verl: trainer, rollout server, agent loop, sampler, reward and configs.

Importing this package imports nothing; `main_ppo` is the entry point that wires the rooms into
verl 0.9.1's V1 trainer.
"""
