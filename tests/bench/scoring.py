"""What scoring costs besides generating: `pivottrace score` on a small pool, and its own clock.

    python -m tests.bench.scoring --out FILE.json [--prompts 16] [--tokens 128] [--shape tiny]

`share` is the time of our own work (prompts, traces, answers, estimators, files) over the time in
vLLM, as the run's manifest has them; `capture_share` is what the same requests take longer in vLLM
with attention captured than without, which only an idle machine can tell. Lengths are capped,
weights are random.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pivottrace_verl.doctor import versions
from pivottrace_verl.files import write_json_atomic
from pivottrace_verl.generation import Engine, Request
from pivottrace_verl.pool import RunDir
from pivottrace_verl.score_rows import rollout_seed
from tests.bench.models import SHAPES, write_model

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 0.05


def pivottrace(*words: str | Path | int) -> None:
    command = [sys.executable, "-m", "pivottrace_verl.cli", *(str(w) for w in words)]
    subprocess.run(command, check=True, cwd=ROOT)


def write_pool(path: Path, n: int) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{2 * i + 9} + {2 * i + 11} ="}],
            "data_source": "sums",
        }
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def stock_seconds(run: RunDir, rollouts: int, tokens: int) -> float:
    """The same requests without capture."""
    with Engine(Path(run.manifest["model"]["path"]), max_prompt_tokens=64, max_tokens=tokens) as e:
        e.generate(
            [
                Request(e.chat_ids(prompt.messages), rollout_seed(0, prompt.pt_id, g))
                for prompt in run.pool()
                for g in range(rollouts)
            ]
        )
        return e.seconds_generating


def measure(folder: Path, shape: str, prompts: int, rollouts: int, tokens: int) -> dict[str, Any]:
    """Score a pool of `prompts` in one part."""
    write_model(folder / "model", shape)
    write_pool(folder / "pool.jsonl", prompts)
    run = folder / "run"
    pivottrace("init", run, "--pool", folder / "pool.jsonl", "--model", folder / "model")
    pivottrace(
        "score", run, "--rollouts", rollouts, "--max-prompt-tokens", 64, "--max-tokens", tokens,
        "--part-size", prompts,
    )  # fmt: skip
    opened = RunDir.open(run)
    timings = opened.manifest["timings"]
    rows = opened.scores().to_pylist()
    generating, own = timings["score_generating"], timings["score_own"]
    stock = stock_seconds(opened, rollouts, tokens)
    made = [r for row in rows for r in row["rollouts"]]
    return {
        "shape": shape,
        "prompts": prompts,
        "rollouts": rollouts,
        "max_tokens": tokens,
        "tokens": sum(r["n_tokens"] for r in made),
        "traced": sum(r["traced"] for r in made),
        "seconds_generating": generating,
        "seconds_own": own,
        "share": round(own / generating, 4),
        "limit": LIMIT,
        "seconds_generating_without_capture": round(stock, 3),
        "capture_share": round(generating / stock - 1, 4),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "machine": platform.machine(),
        "versions": versions(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pivottrace-bench-") as folder:
        found = measure(Path(folder), asked.shape, asked.prompts, asked.rollouts, asked.tokens)
    write_json_atomic(asked.out, found)
    print(f"share {found['share']:.1%} of generating, {asked.out}")
    sys.exit(found["share"] > LIMIT)


if __name__ == "__main__":
    main()
