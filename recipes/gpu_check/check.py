"""Attention capture on a GPU: is it right, and what does it cost? Not yet run on a GPU.

    python recipes/gpu_check/check.py OUT [--quick] [--runners v1,v2] [--model FOLDER]

Writes one JSON file a stage into OUT:

- `machine`: the GPU, the driver and the versions;
- `kernel`: the compiled kernels against the torch reference, on layouts, number formats and shapes;
- `equality`: traces and greedy tokens of one engine with full CUDA graphs, of one without graphs,
  and of one that does not capture, for each model runner;
- `decode`: decode throughput with capture of 2 and 4 layers over none, at 1, 64 and 256 sequences.

A stage that is written is not run again. Exit status 1 if a comparison failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from pivottrace_verl.attention.selftest import GPU_HEAD_DIM, HALF_BOUND
from pivottrace_verl.files import write_json_atomic

HERE = Path(__file__).resolve().parent
STAGES = ("machine", "kernel", "equality", "decode")
RUNNERS = {"v1": "0", "v2": "1"}
MODES = ("off", "layers_2", "layers_4")
SEQUENCES = (1, 64, 256)
KERNEL_BOUND = 1e-4
"""Largest difference allowed between kernel and reference, distances in units of their window."""
GRAPH_BOUND = HALF_BOUND
"""The same between an engine with full graphs and one without: in bfloat16, and graphs pad their
batches, so that the model's own numbers are rounded differently."""


def gpu() -> str | None:
    """The GPU's name; None if there is none."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def machine() -> dict[str, Any]:
    import torch
    import triton

    from pivottrace_verl.doctor import versions

    major, minor = torch.cuda.get_device_capability()
    return {
        "gpu": gpu(),
        "compute_capability": f"{major}.{minor}",
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "versions": versions(),
    }


def kernel(quick: bool) -> dict[str, Any]:
    """In a process of its own: the kernels are compiled there, whatever this one imported."""
    return child("kernel.py", "cuda", "quick" if quick else "full")


def child(script: str, *arguments: str, **environment: str) -> Any:
    """What one of the scripts beside this one prints last."""
    ran = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise SystemExit(f"{script} {' '.join(arguments)} ended with status {ran.returncode}.")
    return json.loads(ran.stdout.strip().splitlines()[-1])


def equality(runners: list[str], quick: bool) -> dict[str, Any]:
    """Engines on one tiny random model: with full graphs, without graphs, without capture."""
    from pivottrace_verl.attention.selftest import make_tiny_model

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="pivottrace-gpu-") as scratch:
        make_tiny_model(scratch, head_dim=GPU_HEAD_DIM)
        for runner in runners:
            use = {"VLLM_USE_V2_MODEL_RUNNER": RUNNERS[runner]}
            n = "8" if quick else "48"
            runs = {
                mode: child("engine.py", "traces", scratch, mode, n, f"{scratch}/{mode}", **use)
                for mode in ("graphs", "no_graphs", "off")
            }
            found[runner] = {
                "runner": runs["graphs"]["runner"],
                "backend": runs["graphs"]["engine"]["backend"],
                "rollouts": len(runs["graphs"]["tokens"]),
                "missing": runs["graphs"]["missing"] + runs["no_graphs"]["missing"],
                "tokens_as_without_capture": runs["graphs"]["tokens"] == runs["off"]["tokens"],
                "tokens_as_without_graphs": _same_tokens(runs["graphs"], runs["no_graphs"]),
                "max_abs_error": _largest_error(Path(scratch), runs["graphs"], runs["no_graphs"]),
                "bound": GRAPH_BOUND,
            }
            found[runner]["ok"] = (
                found[runner]["missing"] == 0
                and found[runner]["tokens_as_without_capture"]
                and found[runner]["max_abs_error"] <= GRAPH_BOUND
            )
    return found | {"ok": all(each["ok"] for each in found.values())}


def _same_tokens(one: dict[str, Any], other: dict[str, Any]) -> int:
    return sum(a == b for a, b in zip(one["tokens"], other["tokens"], strict=True))


def _largest_error(scratch: Path, one: dict[str, Any], other: dict[str, Any]) -> float:
    """Over the tokens before two rollouts part: another batch rounds differently."""
    from pivottrace_verl.attention.channel import Trace
    from pivottrace_verl.attention.config import CaptureConfig
    from pivottrace_verl.attention.replay import compare

    worst = 0.0
    with np.load(scratch / "graphs.npz") as first, np.load(scratch / "no_graphs.npz") as second:
        for i, (a, b) in enumerate(zip(one["tokens"], other["tokens"], strict=True)):
            n = next((j for j in range(len(a)) if a[j] != b[j]), len(a) - 1) + 1
            if f"{i}:stats" not in first or f"{i}:stats" not in second:
                continue
            pair = [Trace("", f[f"{i}:stats"], *f[f"{i}:tokens"]).cut(n) for f in (first, second)]
            worst = max(worst, *compare(pair[0], pair[1], CaptureConfig()).values())
    return worst


def decode(model: Path | None, quick: bool) -> dict[str, Any]:
    """Engines take turns, so that a GPU that slows down slows all of them; two rounds of each."""
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    with tempfile.TemporaryDirectory(prefix="pivottrace-gpu-") as scratch:
        where = str(model) if model else scratch
        sizes = ",".join(str(n) for n in SEQUENCES[: 2 if quick else 3])
        for _ in range(1 if quick else 2):
            for mode in MODES:
                found[mode].append(child("engine.py", "decode", where, mode, sizes))
    summary: dict[str, Any] = {
        mode: {
            n: round(median(speed for run in runs for speed in run["tokens_per_second"][n]), 1)
            for n in runs[0]["tokens_per_second"]
        }
        for mode, runs in found.items()
    }
    ratios = {
        mode: {n: round(speed / summary["off"][n], 4) for n, speed in summary[mode].items()}
        for mode in MODES[1:]
    }
    complete = all(run["missing"] == 0 for runs in found.values() for run in runs)
    return {"tokens_per_second": summary, "over_off": ratios, "runs": found, "ok": complete}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder for the results")
    parser.add_argument("--quick", action="store_true", help="few cases, few tokens")
    parser.add_argument("--runners", default="v1,v2", help="vLLM's model runners to compare")
    parser.add_argument(
        "--model", type=Path, help="model of `decode`; by default random, of Qwen2.5-7B's shape"
    )
    parser.add_argument("--only", choices=STAGES, help="run one stage")
    asked = parser.parse_args()
    asked.runners = asked.runners.split(",")
    if not set(asked.runners) <= set(RUNNERS):
        parser.error(f"--runners must be of {', '.join(RUNNERS)}, not {', '.join(asked.runners)}.")
    if asked.model is not None and not (asked.model / "config.json").is_file():
        parser.error(f"there is no Hugging Face model at {asked.model}: no config.json.")
    if gpu() is None:
        parser.error("this check needs a GPU that torch sees, and there is none here.")
    return asked


def main() -> None:
    asked = arguments()
    asked.out.mkdir(parents=True, exist_ok=True)
    stages = {
        "machine": machine,
        "kernel": lambda: kernel(asked.quick),
        "equality": lambda: equality(asked.runners, asked.quick),
        "decode": lambda: decode(asked.model, asked.quick),
    }
    failed = []
    for name in [asked.only] if asked.only else STAGES:
        file = asked.out / f"{name}.json"
        if not file.exists():
            write_json_atomic(file, stages[name]())
        told = json.loads(file.read_text())
        print(f"{name}: {json.dumps({k: v for k, v in told.items() if k != 'runs'})}")
        if not told.get("ok", True):
            failed.append(name)
    if failed:
        raise SystemExit(f"What should be equal is not: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
