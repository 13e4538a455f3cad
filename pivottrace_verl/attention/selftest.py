"""Proof, on this machine, that captured statistics equal dense attention of the same model.

A child process makes a tiny random Llama model, generates with vLLM and capture on, replays every
rollout with the Hugging Face model in float32 and compares row by row; then it generates again in
an engine without capture and compares the greedy tokens. The capture is installed by vLLM itself
through the entry point, so a plugin that does not load is found here.
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
from pivottrace_verl.errors import PivotTraceError

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

PROMPT_LENGTHS = (1, 5, 40, 150)
N_TOKENS = 48


def run_selftest(
    model_dir: str | os.PathLike[str] | None = None, timeout: float = 600.0
) -> dict[str, Any]:
    """Run the comparison in a child process.

    Args:
        model_dir: a Hugging Face causal model to test instead of the tiny random one.
    Returns:
        dict with `backend`, `isa`, `dtype`, `layers`; `max_abs_error` (distances in units of their
        window; None if no trace arrived) and `errors` by feature; `rows` compared; `missing`
        rollouts without a trace; `greedy_identical`.
    Raises PivotTraceError if there is no such model, and with the child's last words if it fails.
    """
    if os.environ.get(ENV_DISABLE) == "1":
        raise PivotTraceError(
            f"{ENV_DISABLE}=1 switches the capture off, so it cannot be tested; unset it first."
        )
    if model_dir is not None and not Path(model_dir, "config.json").is_file():
        raise PivotTraceError(f"There is no Hugging Face model at {model_dir}: no config.json.")
    with tempfile.TemporaryDirectory(prefix="pivottrace-selftest-") as scratch:
        result = Path(scratch) / "result.json"
        arguments = [sys.executable, "-m", __name__, scratch, str(model_dir or "")]
        environment = {**os.environ, **ENVIRONMENT}
        if model_dir is None:
            environment["OMP_NUM_THREADS"] = "1"  # threads cost more than they help a tiny model
        try:
            child = subprocess.run(
                arguments,
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
            raise PivotTraceError(f"The capture self-test failed: {_last_words(child.stderr)}")
        measured: dict[str, Any] = json.loads(result.read_text())
        return measured


def make_tiny_model(
    directory: str | os.PathLike[str],
    architecture: str = "llama",
    seed: int = 0,
    n_key_heads: int = 2,
) -> Any:
    """A random four-layer model with 4 query heads of size 32, saved without tokenizer.

    `architecture` is llama, qwen2 or gemma2 (soft caps, every other layer slides). Weights are
    drawn wide enough that attention is far from uniform, so that a wrong row could not pass for a
    right one.
    """
    import torch
    from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2Config

    config_class = {"llama": LlamaConfig, "qwen2": Qwen2Config, "gemma2": Gemma2Config}[
        architecture
    ]
    own: dict[str, Any] = {}
    if architecture == "gemma2":
        own = {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 5.0,
            "sliding_window": 64,
        }
    config = config_class(
        vocab_size=384,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=n_key_heads,
        max_position_embeddings=1024,
        initializer_range=0.12,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        **own,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float().eval()
    model.save_pretrained(directory)
    return model


def _measure(scratch: str, model_dir: str) -> dict[str, Any]:
    """The comparison itself, in the child."""
    import torch
    from transformers import AutoModelForCausalLM

    from pivottrace_verl.attention.replay import compare, replay
    from pivottrace_verl.attention.vllm_hooks import flush

    if not model_dir:
        model_dir = os.path.join(scratch, "model")
        make_tiny_model(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(2, vocabulary, (length,), generator=generator).tolist()
        for length in PROMPT_LENGTHS
    ]
    config = CaptureConfig()
    with Receiver(config) as receiver:
        captured = _generate(model_dir, prompts)
        flush()
        info = receiver.wait_ready(timeout=1.0)
        errors: dict[str, float] = {}
        rows = missing = 0
        for i, (prompt, output) in enumerate(zip(prompts, captured, strict=True)):
            trace = receiver.get(f"selftest-{i}", timeout=5.0, n_tokens=len(output))
            if trace is None:
                missing += 1
                continue
            rows += len(trace.stats)
            found = compare(trace, replay(model, prompt, output, config), config)
            errors = {name: max(value, errors.get(name, 0.0)) for name, value in found.items()}
    # The environment is clean again: this engine is stock vLLM.
    plain = _generate(model_dir, prompts)
    return {
        **{name: info[name] for name in ("backend", "isa", "dtype", "layers")},
        "max_abs_error": max(errors.values(), default=None),
        "errors": errors,
        "rows": rows,
        "missing": missing,
        "greedy_identical": captured == plain,
    }


def _generate(model_dir: str, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of a new in-process float32 engine; every request asks for its trace."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model_dir,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=len(prompts),
        max_num_batched_tokens=256,
    )
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
    return [list(output.outputs[0].token_ids) for output in outputs]


def _last_words(text: str) -> str:
    """The last line of a traceback that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if "Error" in line.split(":")[0]]
    return (told or lines or ["it left no message"])[-1]


if __name__ == "__main__":
    _scratch, _model_dir = sys.argv[1:3]
    _result = _measure(_scratch, _model_dir)
    Path(_scratch, "result.json").write_text(json.dumps(_result))
