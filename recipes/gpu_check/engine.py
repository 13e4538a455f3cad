"""One vLLM engine of `check.py`, in a process of its own; prints one line of JSON.

    python recipes/gpu_check/engine.py traces MODEL graphs|no_graphs|off TOKENS FILE
    python recipes/gpu_check/engine.py decode MODEL off|layers_N SEQUENCES,SEQUENCES,...

`traces` generates greedily, a batch that shrinks as its requests end, and keeps the traces in FILE;
`graphs` is vLLM's FULL_AND_PIECEWISE, which is what verl asks for; `no_graphs` is the same compiled
model without graphs; `off` has graphs and no capture. `decode` measures generated tokens a second
while all sequences decode. A folder without weights is filled with the
configuration of Qwen2.5-7B, and weights are random.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from pivottrace_verl.attention.channel import Receiver
from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.attention.selftest import tiny_engine

QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151645,
}
PROMPT, NEW = 2048, 256
"""Tokens of a prompt and generated, where decoding is measured."""
ROUNDS = 3
DECODE_UTILIZATION = 0.85
"""vLLM's share of the device where decoding is measured: the store lies beside the KV cache."""


def make_engine(model: str, mode: str, longest: int, sequences: int, **settings: Any) -> Any:
    from vllm import LLM

    graphs = "NONE" if mode == "no_graphs" else "FULL_AND_PIECEWISE"
    return LLM(
        model,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=longest,
        max_num_seqs=sequences,
        compilation_config={"cudagraph_mode": graphs},
        **settings,
    )


def sampling(key: str, n_tokens: int) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0,
        max_tokens=n_tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args={"pivottrace": {"key": key}},
    )


def prompts(n: int, length: int, vocabulary: int, seed: int) -> list[dict[str, list[int]]]:
    drawn = np.random.default_rng(seed).integers(2, vocabulary, (n, length))
    return [{"prompt_token_ids": ids.tolist()} for ids in drawn]


def traces(model: str, mode: str, n_tokens: int, file: Path) -> dict[str, Any]:
    with Receiver(CaptureConfig()) as receiver:
        if mode == "off":
            receiver.close()
        llm = make_engine(model, mode, 512, 16, **tiny_engine(on_cpu=False))
        asked = [
            prompt
            for i, length in enumerate((1, 5, 40, 150, 300) * 3)
            for prompt in prompts(1, length, 384, i)
        ]
        params = [sampling(str(i), n_tokens + 2 * i) for i in range(len(asked))]
        # All requests are there before the first step: otherwise the batches, and with them the
        # last bits of a number, would hang on the clock.
        llm.sleep(level=0)
        llm.enqueue(asked, params, use_tqdm=False)
        llm.wake_up(tags=["scheduling"])
        outputs = llm.wait_for_completion(use_tqdm=False)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        found = {}
        for i, ids in enumerate(tokens if mode != "off" else []):
            trace = receiver.get(str(i), timeout=10.0, n_tokens=len(ids))
            if trace is not None:
                found[f"{i}:stats"] = trace.stats
                found[f"{i}:tokens"] = np.stack([trace.token_entropy, trace.self_certainty])
    np.savez(f"{file}.npz", **found)
    missing = 0 if mode == "off" else len(tokens) - len(found) // 2
    use_v2 = getattr(llm.llm_engine.vllm_config, "use_v2_model_runner", None)
    told = {"tokens": tokens, "missing": missing, "engine": receiver.engine}
    return told | {"runner": "v2" if use_v2 else "v1"}


def decode(model: str, mode: str, sizes: list[int]) -> dict[str, Any]:
    folder = Path(model)
    if not (folder / "config.json").is_file():
        (folder / "config.json").write_text(json.dumps(QWEN_7B))
    random = {} if list(folder.glob("*.safetensors")) else {"load_format": "dummy"}
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    n_layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    traced = int(mode.partition("_")[2] or 0)
    # Evenly in the middle third.
    places = {int(n_layers / 3 * (1 + (i + 0.5) / traced)) for i in range(traced)}
    with Receiver(CaptureConfig(layers=tuple(sorted(places)) or None)) as receiver:
        if mode == "off":
            receiver.close()
        settings = {"gpu_memory_utilization": DECODE_UTILIZATION, **random}
        llm = make_engine(model, mode, PROMPT + NEW, max(sizes), **settings)
        found: dict[str, list[float]] = {}
        missing = 0
        for n in sizes:
            found[str(n)] = []
            for turn in range(ROUNDS + 1):  # the first one warms up
                seconds, steps = timed(llm, n, vocabulary, f"{n}-{turn}")
                if turn:
                    found[str(n)].append(n * steps / seconds)
                for i in range(n if mode != "off" else 0):
                    missing += receiver.get(f"{n}-{turn}-{i}", 10.0, NEW) is None
    return {"tokens_per_second": found, "missing": missing, "engine": receiver.engine}


def timed(llm: Any, n: int, vocabulary: int, key: str) -> tuple[float, int]:
    """Seconds and steps in which all of `n` sequences decode, up to the last two: the engine may be
    a step ahead."""
    engine = llm.llm_engine
    for i, prompt in enumerate(prompts(n, PROMPT, vocabulary, n)):
        engine.add_request(f"{key}-{i}", prompt, sampling(f"{key}-{i}", NEW))
    lengths = dict.fromkeys((f"{key}-{i}" for i in range(n)), 0)
    begin, first = 0.0, 0
    end, last = 0.0, 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            name = output.request_id
            lengths[name] = len(output.outputs[0].token_ids)
        least = min(lengths.values())
        now = time.perf_counter()
        if least >= 1 and not begin:
            begin, first = now, least
        if max(lengths.values()) <= NEW - 2:
            end, last = now, least
    return end - begin, last - first


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("traces", "decode"))
    parser.add_argument("model")
    parser.add_argument("mode", help="graphs, no_graphs or off; off or layers_N")
    parser.add_argument("numbers", help="tokens; numbers of sequences")
    parser.add_argument("file", type=Path, nargs="?")
    asked = parser.parse_args()
    if asked.what == "traces":
        told = traces(asked.model, asked.mode, int(asked.numbers), asked.file)
    else:
        told = decode(asked.model, asked.mode, [int(n) for n in asked.numbers.split(",")])
    sys.stdout.flush()
    print(json.dumps(told))


if __name__ == "__main__":
    main()
