"""How long an import takes: `python -m tests.bench.annotation --out FILE.json`.

Each case is one import into a new run directory, in a process of its own: seconds from the call to
its return, CPU seconds of that process without the answers' workers, the peak memory of it, and of
each worker. Labels are mathematics. `mixed`: as they come in pools of contest problems (60%
integers below 10,000, 25% fractions, 15% surds), many of them more than once. `distinct`: the same
sorts, every label another one, the worst case for `--check all`.
"""

import argparse
import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pivottrace_verl.annotation import import_labels
from pivottrace_verl.pool import RunDir

CASES = [
    ("mixed", "all"),
    ("mixed", "sample:2000"),
    ("mixed", "none"),
    ("distinct", "all"),
    ("distinct", "sample:2000"),
    ("distinct", "none"),
]


def mixed(rng: random.Random, _: int) -> str:
    sort = rng.random()
    if sort < 0.6:
        return str(rng.randrange(10_000))
    if sort < 0.85:
        return f"\\frac{{{rng.randrange(1, 100)}}}{{{rng.randrange(2, 100)}}}"
    return f"{rng.randrange(2, 50)}\\sqrt{{{rng.randrange(2, 100)}}}"


def distinct(rng: random.Random, k: int) -> str:
    sort = rng.random()
    if sort < 0.6:
        return str(10**6 + k)
    if sort < 0.85:
        return f"\\frac{{{10**6 + k}}}{{7}}"
    return f"{10**6 + k}\\sqrt{{2}}"


def make_run(folder: Path, n: int) -> RunDir:
    model = folder / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "llama"}')
    (model / "model.safetensors").write_bytes(bytes(1000))
    pool = folder / "pool.jsonl"
    with open(pool, "w") as file:
        for i in range(n):
            prompt = [{"role": "user", "content": f"Problem {i}: what is {i} + 1?"}]
            file.write(json.dumps({"prompt": prompt, "data_source": "bench"}) + "\n")
    return RunDir.create(folder / "run", pool, model, answers_kind="math")


def one(run: str, labels: str, check: str) -> None:
    """The measured process."""
    start, cpu = time.perf_counter(), sum(os.times()[:2])
    result = import_labels(RunDir.open(run), labels, "ana", check=check)
    seconds = time.perf_counter() - start
    cpu = sum(os.times()[:2]) - cpu
    peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    workers = [_peak_mib(pid) for pid in _children()]
    peaks = {"peak_rss_mib": peak, "workers_peak_rss_mib": workers}
    found = result.check
    assert found is not None
    facts = {"added": result.added, "different": found.distinct, "checked": found.checked}
    print(
        json.dumps({"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), **peaks, **facts})
    )


def _children() -> list[str]:
    """The answers' worker processes, which live on until this one ends."""
    files = Path("/proc/self/task").glob("*/children")
    return [pid for file in files for pid in file.read_text().split()]


def _peak_mib(pid: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return round(int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) / 1024)


def measure(n: int) -> list[dict[str, Any]]:
    out = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = make_run(folder, n)
        ids = [prompt.pt_id for prompt in made.pool()]
        for labels in (mixed, distinct):
            rng = random.Random(0)
            with open(folder / f"{labels.__name__}.csv", "w") as file:
                file.write("pt_id,label\n")
                file.writelines(f'{i},"{labels(rng, k)}"\n' for k, i in enumerate(ids))
        for labels_name, check in CASES:
            run = folder / "copy"
            shutil.copytree(made.path, run)
            case = ["--one", str(run), str(folder / f"{labels_name}.csv"), check]
            done = subprocess.run(
                [sys.executable, "-m", "tests.bench.annotation", *case],
                capture_output=True,
                text=True,
                check=True,
            )
            shutil.rmtree(run)
            out.append({"labels": labels_name, "check": check, **json.loads(done.stdout)})
            print(out[-1], flush=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--n", type=int, default=100_000)
    parser.add_argument("--one", nargs=3, metavar=("RUN", "LABELS", "CHECK"))
    asked = parser.parse_args()
    if asked.one:
        one(*asked.one)
        return
    result = {
        "labels": asked.n,
        "cores": os.cpu_count(),
        "load_before": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "cases": measure(asked.n),
    }
    if asked.out:
        asked.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
