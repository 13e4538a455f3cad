"""What capturing attention costs: decoding with it, beside stock decoding and the alternatives.

    python -m tests.bench.attention --out FILE.json [--dtypes float32] [--rounds 5] [--quick]

With `--dtypes` one at a time it can be run in pieces: what FILE.json holds of other dtypes stays,
if it is of the same processor and versions. What depends on no dtype belongs to float32's piece.

Each way has an engine in a process of its own: `off` (stock), `layers_2` and `layers_4`
(captured), `torch_2` (captured without compiled code, some forty torch operations a layer) and
`copy_2` (hooks that copy each request's queries and keys of two layers at every step, as vllm-lens
does; its softmax afterwards is not counted). Two processes that do the same differ by up to 5% for
as long as they live, and a machine's speed by more within seconds; so every second decode step is
captured, and each step is compared with its two neighbours: `more_ms` is the median difference,
`error_ms` its standard error, `speed_over_off` what a step without takes over that and the
difference. `off` is measured alike and shows what the measure is worth. What a finished request
costs once is `send_ms`. Beside them: a Hugging Face eager forward with `output_attentions` over
the same tokens, the reference's time as the context grows, the store's bytes a token, and, as a
model and not a measurement, the share of bytes that capture would add to a decode step on a GPU.

Weights are random, shapes are SmolLM2-135M's. Speeds are meaningful on an idle machine only: the
load while it ran is in the file.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from pivottrace_verl.doctor import versions
from pivottrace_verl.files import write_json_atomic
from tests.bench.attention_engine import MARK
from tests.bench.models import SHAPES, write_model

ROOT = Path(__file__).resolve().parents[2]
MODES = ("off", "layers_2", "layers_4", "torch_2", "copy_2")
LEAST = {"short": {"layers_2": 0.97, "layers_4": 0.95}, "long": {"layers_2": 0.95}}
"""Wanted in every dtype: decoding speed over that of `off`."""
MOST_MS = {"float32": 1.25, "bfloat16": 0.9}
"""Wanted of the short batch with two layers: half of what a prototype spent in its hooks a step, on
another machine."""
MOST_OF_TORCH = 0.5
"""The same wish for any machine: of the time in the hooks without compiled code."""
BATCHES = {"short": (16, 64, 128), "long": (4, 1984, 64)}
"""Requests, prompt tokens, generated tokens."""
QUICK = {"short": (4, 16, 24), "long": (2, 256, 16)}


class Child:
    """One engine in a process of its own, generating when told to."""

    def __init__(self, mode: str, model: Path, dtype: str, longest: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.attention_engine", mode, str(model), dtype,
             str(longest)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(MARK):
                answer: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return answer
        raise SystemExit(f"an engine ended with status {self.process.wait()}")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


Step = tuple[bool, float, float]
"""Whether it was captured, its seconds, and those in our hooks."""


def measure_mode(
    mode: str,
    model: Path,
    dtype: str,
    batches: dict[str, tuple[int, int, int]],
    rounds: int,
    vocabulary: int,
) -> dict[str, dict[str, Any]]:
    """One way to decode; the first round is captured whole and left out of the times."""
    child = Child(mode, model, dtype, max(prompt + new for _, prompt, new in batches.values()))
    found = {}
    for name, (n, prompt, new) in batches.items():
        runs: list[list[Step]] = []
        for turn in range(rounds + 1):
            answer = child.ask(
                seed=turn,
                vocabulary=vocabulary,
                n=n,
                prompt=prompt,
                new=new,
                every=2 if turn else 1,
            )
            if turn:
                runs.append([tuple(step) for step in answer["steps"]])
            else:
                complete, sending = answer["complete"], answer["sending"]
        if complete != (n if mode.startswith(("layers", "torch")) else 0):
            raise SystemExit(f"{mode} has {complete} complete traces of {n}")
        found[name] = {**summary(runs), "send_ms": round(1e3 * sending / n, 3)}
        print(f"{dtype} {name} {mode}: {found[name]}", flush=True)
    child.close()
    return found


def differences(steps: list[Step]) -> list[float]:
    """Seconds that capture adds, of each step that has a neighbour on both sides: neighbours are of
    the other kind, and their mean is what the step would have taken, had it been of their kind."""
    return [
        (step[1] - (before[1] + after[1]) / 2) * (1 if step[0] else -1)
        for before, step, after in zip(steps, steps[1:], steps[2:], strict=False)
    ]


def summary(runs: list[list[Step]]) -> dict[str, Any]:
    steps = [step for run in runs for step in run]
    idle = median(took for captured, took, _ in steps if not captured)
    each = [median(differences(run)) for run in runs]
    every = [value for run in runs for value in differences(run)]
    more = median(every)
    # Half of the distance between the quartiles is .6745 of a normal deviation, whatever the
    # outliers, and a median's error is 1.2533 of a mean's; neighbours share steps: thrice counted.
    quartiles = quantiles(every, n=4)
    deviation = (quartiles[2] - quartiles[0]) / 2 / 0.6745
    error = 1.2533 * deviation / math.sqrt(len(every) / 3)
    return {
        "idle_step_ms": round(1e3 * idle, 3),
        "more_ms": round(1e3 * more, 3),
        "error_ms": round(1e3 * error, 3),
        "speed_over_off": round(idle / (idle + more), 4),
        "speed_over_off_each": [round(idle / (idle + value), 4) for value in each],
        "hooks_ms": round(1e3 * median(hooks for captured, _, hooks in steps if captured), 3),
        "steps": len(steps),
    }


def eager_seconds(model: Path, batch: tuple[int, int, int], vocabulary: int) -> float:
    """A Hugging Face forward with `output_attentions` over one batch's prompts and outputs."""
    import torch
    from transformers import AutoModelForCausalLM

    n, prompt, new = batch
    net = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids = torch.randint(8, vocabulary, (n, prompt + new - 1))
    took = []
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            net.base_model(ids, output_attentions=True, use_cache=False)
            took.append(time.perf_counter() - start)
    return median(took)


def context_cost(shape: dict[str, Any], contexts: list[int], n: int) -> dict[str, Any]:
    """The time of one layer's rows, for `n` rows of the shape, as the context grows."""
    import numpy as np
    import torch

    from pivottrace_verl.attention.config import CaptureConfig
    from pivottrace_verl.attention.cpu_rows import LayerRows, StepRows, compiled_rows
    from pivottrace_verl.attention.keys import PagedKeys
    from pivottrace_verl.attention.reference import ScoreRule, row_statistics
    from pivottrace_verl.pivots import FEATURES

    size, block = shape["head_dim"], 128  # vLLM's default on CPUs
    n_heads, rule = shape["num_attention_heads"], ScoreRule(size**-0.5)
    query = torch.randn(n, n_heads, size)
    found: dict[str, list[float]] = {"compiled": [], "reference": []}
    for context in contexts:
        blocks = context // block
        cache = torch.randn(n * blocks, shape["num_key_value_heads"], block, 2 * size)
        table = torch.randperm(n * blocks).int().view(n, blocks).numpy()
        starts = np.full(n, (context - 1) // 4)
        step = StepRows(table, [context - 1] * n, starts, block, CaptureConfig())
        layer = LayerRows("columns", rule, None, (tuple(range(n_heads)),), n_heads)
        compiled = compiled_rows([cache], [layer], CaptureConfig())
        assert compiled is not None
        stats, slots = torch.empty(n, 1, 1, len(FEATURES)), torch.arange(n)
        ways: dict[str, Callable[[], Any]] = {
            "compiled": partial(compiled.write_rows, 0, query, cache, step, stats, slots),
            "reference": partial(
                row_statistics, query, PagedKeys(cache, "columns"), step.plan(None), rule
            ),
        }
        for way, run in ways.items():
            run()
            took = []
            for _ in range(9):
                start = time.perf_counter()
                run()
                took.append(time.perf_counter() - start)
            found[way].append(round(1e3 * median(took), 3))
    own = found["compiled"]
    return {
        "rows": n,
        "contexts": contexts,
        "ms_per_layer": own,
        "reference_ms_per_layer": found["reference"],
        # 1 is linear; below it, what does not grow with the keys still counts.
        "growth_over_linear": round(own[-1] / own[0] / (contexts[-1] / contexts[0]), 3),
    }


def store_bytes(layers: int) -> int:
    """Bytes of the store a token, one head group."""
    from pivottrace_verl.attention.store import SlotStore
    from pivottrace_verl.pivots import FEATURES

    store = SlotStore(64, layers, 1, len(FEATURES))
    return sum(t.numel() * t.element_size() for t in (store.stats, store.tokens, store.owner)) // 64


def processor() -> str:
    """Its name and widest vector instructions."""
    words = Path("/proc/cpuinfo").read_text()
    name = next(line.partition(":")[2].strip() for line in words.splitlines() if "name" in line)
    widest = next((kind for kind in ("amx", "avx512", "avx2") if kind in words), "")
    return f"{name} {widest}".strip()


MODELS = {
    # layers, KV heads, head size, parameters in billions
    "Qwen2.5-7B": (28, 4, 128, 7.62),
    "Qwen3-8B": (36, 8, 128, 8.19),
}


def byte_model(name: str, requests: int, context: int, traced: int) -> float:
    """Key bytes that capture reads over the bytes of a decode step (16-bit weights and KV)."""
    layers, kv_heads, size, billions = MODELS[name]
    keys = kv_heads * size * 2 * context * requests
    return traced * keys / (2 * layers * keys + 2 * billions * 1e9)


def measure(
    folder: Path, quick: bool, rounds: int, dtypes: list[str], before: dict[str, Any]
) -> dict[str, Any]:
    """All figures; `before` is what an earlier run wrote."""
    shape = SHAPES["tiny" if quick else "smollm2-135m"]
    write_model(folder, "tiny" if quick else "smollm2-135m")
    batches = QUICK if quick else BATCHES
    contexts = [256, 512, 1024] if quick else [256, 512, 1024, 2048, 4096]
    here = {
        "quick": quick,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "processor": processor(),
        "versions": versions(),
    }
    same = before if here.items() <= before.items() else {}
    decoding, loads = dict(same.get("decoding", {})), dict(same.get("load", {}))
    for dtype in dtypes:
        load = os.getloadavg()[0]
        modes = {
            mode: measure_mode(mode, folder, dtype, batches, rounds, shape["vocab_size"])
            for mode in MODES
        }
        decoding[dtype] = {
            name: {
                "requests": n,
                "prompt": prompt,
                "new": new,
                "modes": {mode: of[name] for mode, of in modes.items()},
            }
            for name, (n, prompt, new) in batches.items()
        }
        loads[dtype] = {"before": round(load, 2), "after": round(os.getloadavg()[0], 2)}
    if same and "float32" not in dtypes:
        beside = {name: same[name] for name in ("hf_output_attentions", "context")}
    else:
        eager = eager_seconds(folder, batches["short"], shape["vocab_size"])
        _, _, new = batches["short"]
        first = "float32" if "float32" in decoding else dtypes[0]
        stock = decoding[first]["short"]["modes"]["off"]["idle_step_ms"] * (new - 1) / 1e3
        beside = {
            "hf_output_attentions": {
                "seconds_per_batch": round(eager, 3),
                "over_decoding_the_batch": round(eager / stock, 3),
            },
            "context": context_cost(shape, contexts, 4 if quick else 16),
        }
    return {
        **here,
        **beside,
        "rounds": rounds,
        "decoding": decoding,
        "wanted": {
            "speed_over_off": LEAST,
            "hooks_ms_layers_2": MOST_MS,
            "hooks_of_torch_layers_2": MOST_OF_TORCH,
        },
        "store_bytes_per_token": {str(n): store_bytes(n) for n in (1, 2, 4)},
        "byte_model_not_measured": {
            f"{name}, {requests} x {context}, {traced} layers": round(
                byte_model(name, requests, context, traced), 4
            )
            for name in MODELS
            for requests, context in ((64, 2048), (256, 4096))
            for traced in (2, 4)
        },
        "load": loads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it work at all?")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pivottrace-bench-") as folder:
        rounds = 1 if asked.quick else asked.rounds
        before = json.loads(asked.out.read_text()) if asked.out.exists() else {}
        found = measure(Path(folder), asked.quick, rounds, asked.dtypes.split(","), before)
    write_json_atomic(asked.out, found)
    missed = []
    for dtype, batches in found["decoding"].items():
        for name, batch in batches.items():
            for mode, own in batch["modes"].items():
                print(f"{dtype} {name} {mode}: {own['speed_over_off']} of the speed without, "
                      f"{own['hooks_ms']} of {own['idle_step_ms']} ms in hooks")  # fmt: skip
                if own["speed_over_off"] < LEAST[name].get(mode, 0.0):
                    missed.append(f"speed {dtype} {name} {mode}")
        in_hooks = {mode: own["hooks_ms"] for mode, own in batches["short"]["modes"].items()}
        if in_hooks["layers_2"] > MOST_MS[dtype]:
            missed.append(f"hooks {dtype} short layers_2")
        if in_hooks["layers_2"] > MOST_OF_TORCH * in_hooks["torch_2"]:
            missed.append(f"hooks {dtype} short layers_2 against torch")
    for name in ("hf_output_attentions", "context", "store_bytes_per_token"):
        print(f"{name}: {found[name]}")
    print(f"model of a GPU's bytes, not measured: {found['byte_model_not_measured']}")
    print(f"{asked.out}; below what is wanted: {', '.join(missed) or 'nothing'}")
    sys.exit(bool(missed) and not asked.quick)


if __name__ == "__main__":
    main()
