"""vLLM's CPU build as verl's rollout engine: linear weights that can be loaded again.

Applied by the `vllm.general_plugins` entry point in vLLM's processes, before a model is loaded.
"""

from pivottrace_verl.cpu.distribution import vllm_build_is_cpu

_MARK = "_pivottrace_cpu"


def install() -> list[str]:
    """Apply the shim if vLLM's build is the CPU one; returns the names of those in force."""
    if not vllm_build_is_cpu():
        return []
    shim_linear_weights()
    return ["linear_weights"]


def shim_linear_weights() -> None:
    """Stand in for vllm/model_executor/layers/utils.py:269 (`dispatch_cpu_unquantized_gemm`).

    vLLM packs each linear weight after loading and replaces the parameter by an empty one
    (`remove_weight=True`), so verl's weight sync finds no `weight_loader` to load into. Here a
    linear layer keeps its parameter and multiplies with it directly: there is no packed copy that
    could be older than the last sync. Anything but a two-dimensional weight is left to vLLM.
    """
    import torch
    from vllm.model_executor.layers import utils

    original = utils.dispatch_cpu_unquantized_gemm
    if getattr(original, _MARK, False):
        return

    def dispatch(layer: torch.nn.Module, remove_weight: bool) -> None:
        if layer.weight.is_meta or layer.weight.ndim != 2:
            original(layer, remove_weight)
            return
        layer.cpu_linear = torch.nn.functional.linear

    setattr(dispatch, _MARK, True)
    utils.dispatch_cpu_unquantized_gemm = dispatch
