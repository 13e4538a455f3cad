"""Proof, on this machine, that captured statistics equal dense attention of the same model.

A child process makes a tiny random Llama model, generates with vLLM and capture on, replays every
rollout with the Hugging Face model in float32 and compares row by row; a second one generates again
in an engine without capture, and the greedy tokens are compared. Each engine has a process of its
own, as one gives a GPU's memory back only when it ends. The capture is installed by vLLM itself
through the entry point, so a plugin that does not load is found here.

On a CPU the engines run in float32 and eagerly; elsewhere as vLLM runs them by default, in 16 bits,
compiled and with CUDA graphs. That was not yet run on a GPU.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pivottrace_verl.attention.channel import Receiver
from pivottrace_verl.attention.config import ENV_DISABLE, CaptureConfig
from pivottrace_verl.errors import PivotTraceError, last_error

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""What a small vLLM engine on a CPU needs; also used by the tests."""

BOUNDS = {"float32": 1e-4}
"""Largest difference allowed between captured and dense statistics, by the engine's number format;
distances in units of their window."""
HALF_BOUND = 0.2
"""The same for every other format: engines in bfloat16 on a CPU are 0.03 to 0.09 off float32
attention at most on four tiny models, and 0.9 and more where rows are shifted by one."""
GPU_HEAD_DIM = 128
"""Head size of a tiny model on a GPU: one that all of vLLM's backends there serve."""
KV_CACHE_BYTES = 1 << 30
"""KV cache of a tiny model's engine on a GPU: the store of a model whose keys are small is large
beside them, and would not fit beside vLLM's usual share of the device."""

_SLIDING = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 64,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "mistral": ("MistralConfig", {"head_dim": 32, "sliding_window": None}),
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 5.0, **_SLIDING},
    ),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 256, "query_pre_attn_scalar": 256, **_SLIDING}),
}
"""Tiny models to test with: the class of their configuration and what is their own in it."""

PROMPT_LENGTHS = (1, 5, 40, 150)
N_TOKENS = 48


def run_selftest(
    model_dir: str | os.PathLike[str] | None = None,
    config: CaptureConfig | None = None,
    timeout: float = 600.0,
) -> dict[str, Any]:
    """Run the comparison in a child process.

    Args:
        model_dir: a Hugging Face causal model to test instead of the tiny random one.
        config: what is captured of it; None: `CaptureConfig()`.
    Returns:
        dict with `backend`, `isa`, `dtype`, `layers`, `heads`; `max_abs_error` (distances in units
        of their window; None if no trace arrived), the `bound` it should keep, and `errors` by
        feature; `rows` compared of `tokens` generated; `missing` rollouts without a trace;
        `greedy_identical`.
    Raises PivotTraceError if there is no such model, and with the child's last words if it fails.
    """
    if os.environ.get(ENV_DISABLE) == "1":
        raise PivotTraceError(
            f"{ENV_DISABLE}=1 switches the capture off, so it cannot be tested; unset it first."
        )
    if model_dir is not None and not Path(model_dir, "config.json").is_file():
        raise PivotTraceError(f"There is no Hugging Face model at {model_dir}: no config.json.")
    with tempfile.TemporaryDirectory(prefix="pivottrace-selftest-") as scratch:
        arguments = [scratch, str(model_dir or ""), (config or CaptureConfig()).to_json()]
        captured, plain = (_child(part, arguments, timeout) for part in ("captured", "plain"))
    identical = captured.pop("outputs") == plain["outputs"]
    return {**captured, "greedy_identical": identical}


def _child(part: str, arguments: list[str], timeout: float) -> dict[str, Any]:
    """Run `part` of the test in a process of its own; `arguments` are those of `_main`."""
    scratch, model_dir, _ = arguments
    result = Path(scratch) / f"{part}.json"
    environment = {**os.environ, **ENVIRONMENT}
    if not model_dir:
        environment["OMP_NUM_THREADS"] = "1"  # threads cost more than they help a tiny model
    try:
        child = subprocess.run(
            [sys.executable, "-m", __name__, part, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise PivotTraceError(
            f"The capture self-test did not finish within {timeout:g} seconds."
        ) from error
    if child.returncode != 0 or not result.exists():
        why = last_error(child.stderr) or f"it ended with status {child.returncode}"
        raise PivotTraceError(f"The capture self-test failed: {why}")
    told: dict[str, Any] = json.loads(result.read_text())
    return told


def make_tiny_model(
    directory: str | os.PathLike[str],
    architecture: str = "llama",
    seed: int = 0,
    n_key_heads: int = 2,
    head_dim: int | None = None,
) -> Any:
    """A random four-layer model with 4 query heads, saved without tokenizer.

    `architecture` is one of `ARCHITECTURES`, of its own head size unless `head_dim` is given; where
    a model has layers with a sliding window, every other one has. Weights are drawn wide enough
    that attention is far from uniform, so that a wrong row could not pass for a right one.
    """
    import torch
    import transformers

    config_class, own = ARCHITECTURES[architecture]
    config = getattr(transformers, config_class)(
        **{
            "vocab_size": 384,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": n_key_heads,
            "max_position_embeddings": 1024,
            "initializer_range": 0.12,
            "bos_token_id": None,
            "eos_token_id": 1,
            "pad_token_id": 0,
            **own,
            **({} if head_dim is None else {"head_dim": head_dim}),
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    model.save_pretrained(directory)
    return model


def _captured(model_dir: str, config: CaptureConfig) -> dict[str, Any]:
    """Generate with capture and compare with dense attention; `outputs` are the tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    from pivottrace_verl.attention.replay import compare, replay
    from pivottrace_verl.attention.vllm_hooks import flush

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with Receiver(config) as receiver:
        prompts, outputs = _generate(model_dir)
        flush()
        info = receiver.wait_ready(timeout=1.0)
        errors: dict[str, float] = {}
        rows = missing = 0
        for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            trace = receiver.get(f"selftest-{i}", timeout=5.0, n_tokens=len(output))
            if trace is None:
                missing += 1
                continue
            rows += len(trace.stats)
            found = compare(trace, replay(model, prompt, output, config), config)
            errors = {name: max(value, errors.get(name, 0.0)) for name, value in found.items()}
    return {
        **{name: info[name] for name in ("backend", "isa", "dtype", "layers", "heads")},
        "max_abs_error": max(errors.values(), default=None),
        "bound": BOUNDS.get(info["dtype"], HALF_BOUND),
        "errors": errors,
        "rows": rows,
        "tokens": sum(map(len, outputs)),
        "missing": missing,
        "outputs": outputs,
    }


def tiny_engine(on_cpu: bool) -> dict[str, Any]:
    """Settings of an engine for a model of `make_tiny_model`, or another of which little is asked;
    off a CPU what vLLM runs by default, but for the share of the device it takes."""
    if on_cpu:
        return {"dtype": "float32", "enforce_eager": True}
    return {"kv_cache_memory_bytes": KV_CACHE_BYTES, "gpu_memory_utilization": 0.1}


def _generate(model_dir: str) -> tuple[list[list[int]], list[list[int]]]:
    """(prompts, greedy tokens) of a new in-process engine; every request asks for its trace."""
    import torch
    from vllm import LLM, SamplingParams

    llm = LLM(
        model_dir,
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=len(PROMPT_LENGTHS),
        max_num_batched_tokens=256,
        **tiny_engine(_on_cpu()),
    )
    vocabulary = llm.llm_engine.model_config.hf_text_config.vocab_size
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(2, vocabulary, (length,), generator=generator).tolist()
        for length in PROMPT_LENGTHS
    ]
    sampling = [
        SamplingParams(
            temperature=0.0,
            max_tokens=N_TOKENS,
            ignore_eos=True,
            detokenize=False,
            extra_args={"pivottrace": {"key": f"selftest-{i}"}},
        )
        for i in range(len(prompts))
    ]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    return prompts, [list(output.outputs[0].token_ids) for output in outputs]


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _main(part: str, scratch: str, model_dir: str, config: str) -> None:
    if not model_dir:
        model_dir = os.path.join(scratch, "model")
        if not os.path.exists(model_dir):
            make_tiny_model(model_dir, head_dim=None if _on_cpu() else GPU_HEAD_DIM)
    told = (
        _captured(model_dir, CaptureConfig.from_json(config))
        if part == "captured"
        else {"outputs": _generate(model_dir)[1]}
    )
    Path(scratch, f"{part}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    _main(*sys.argv[1:])
