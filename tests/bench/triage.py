"""How long `pivottrace triage` takes, and how much memory, by size of the pool.

    python -m tests.bench.triage --out FILE.json [--sizes 10000,100000,1000000] [--repeat 3]

Makes a run directory of each size in a temporary folder (not timed): scores with every column,
8 rollouts a prompt, three answer clusters, 2% probes bought, exact answers. Then runs the whole
command in a process of its own, interpreter and imports included, and takes wall time and peak
memory from the kernel. Nothing else heavy should run meanwhile.

Axes: P prompts, G rollouts of a prompt.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pivottrace_verl.files import fingerprint, write_json_atomic, write_tables_atomic
from pivottrace_verl.pool import RunDir
from pivottrace_verl.schemas import POOL_SCHEMA, ROLLOUT, SCORE_SCHEMA
from pivottrace_verl.triage import choose_probes, default_probes

G = 8
PIECE = 1 << 16
LIMITS = {"seconds": 15.0, "peak_gib": 1.5, "prompts": 1_000_000}


def make_run(path: Path, n: int) -> RunDir:
    """A run directory scored and probed, as the stages before triage leave it."""
    rng = np.random.default_rng(n)
    path.mkdir()
    text = rng.bytes(8 * n).hex()
    ids = [text[i : i + 16] for i in range(0, 16 * n, 16)]
    print_of = {"pool": fingerprint(ids), "model": "0" * 16}
    manifest = {
        "format": 1,
        "pool": {"fingerprint": print_of["pool"], "n_prompts": n, "source": "none"},
        "model": {"path": "none", "fingerprint": print_of["model"]},
        "answers": {"kind": "exact"},
    }
    write_json_atomic(path / "manifest.json", manifest)
    run = RunDir.open(path)
    hard = rng.random(n)
    write(path / "pool.parquet", pool_pieces(ids), {"pool": print_of["pool"]})
    write(path / "scores.parquet", score_pieces(ids, hard, rng), print_of)
    probes = choose_probes(hard, pa.array(ids), default_probes(n), seed=0)
    run.write_probes("pivot_density", 0, probes)
    who = {"label": "1", "annotator": "bench", "source_file": "bench", "purpose": "probe"}
    run.ledger().append({"pt_id": pt_id, **who} for pt_id in probes)
    return run


def write(path: Path, tables: Iterator[pa.Table], made_from: dict[str, str]) -> None:
    note = json.dumps(made_from, sort_keys=True)
    write_tables_atomic(path, tables, {b"pivottrace.made_from": note})


def pool_pieces(ids: list[str]) -> Iterator[pa.Table]:
    for i in range(0, len(ids), PIECE):
        rows = [
            {
                "pt_id": pt_id,
                "prompt": [{"role": "user", "content": f"What comes after {pt_id}?"}],
                "data_source": f"source {k % 5}",
                "extra_info": json.dumps({"index": k}),
            }
            for k, pt_id in enumerate(ids[i : i + PIECE], start=i)
        ]
        yield pa.Table.from_pylist(rows, schema=POOL_SCHEMA)


def score_pieces(ids: list[str], hard: np.ndarray, rng: np.random.Generator) -> Iterator[pa.Table]:
    for i in range(0, len(ids), PIECE):
        yield score_piece(ids[i : i + PIECE], hard[i : i + PIECE], rng)


def score_piece(ids: list[str], hard: np.ndarray, rng: np.random.Generator) -> pa.Table:
    """The harder, the fewer of the rollouts say "1", the right answer; 3% are broken."""
    n = len(ids)
    right = rng.binomial(G, np.clip(1.2 - 1.2 * hard, 0, 1))
    other = rng.binomial(G - right, 0.7)
    counts = np.stack([right, other, G - right - other], axis=1)
    known: dict[str, Any] = {
        "pt_id": pa.array(ids),
        "n_rollouts": pa.repeat(G, n),
        "answers": lists(3, n, ANSWER, answer=wrong_answers(rng, n), count=counts.ravel()),
        "majority": pa.array(np.where(right > other, "1", "2")),
        "truncated": pa.array(rng.binomial(G, np.where(rng.random(n) < 0.03, 0.9, 0.05))),
        "uncertainty/pivot_density": pa.array(hard + 0.2 * rng.normal(size=n)),
        "rollouts": lists(G, n, ROLLOUT),
    }
    columns = []
    for field in SCORE_SCHEMA:
        column = known.get(field.name)
        columns.append(noise(field.type, n, rng) if column is None else column.cast(field.type))
    return pa.Table.from_arrays(columns, schema=SCORE_SCHEMA)


ANSWER = SCORE_SCHEMA.field("answers").type.value_type


def wrong_answers(rng: np.random.Generator, n: int) -> np.ndarray:
    answers = rng.integers(2, 10_000, size=(n, 3)).astype(str)
    answers[:, 0] = "1"
    return answers.ravel()


def lists(each: int, n: int, struct: pa.StructType, **known: np.ndarray) -> pa.ListArray:
    """[n] lists of `each` structs; fields that are not known are noise."""
    rng = np.random.default_rng(each)
    fields = [
        pa.array(known[f.name]).cast(f.type) if f.name in known else noise(f.type, each * n, rng)
        for f in struct
    ]
    offsets = np.arange(0, each * n + 1, each, dtype=np.int32)
    return pa.ListArray.from_arrays(
        offsets, pa.StructArray.from_arrays(fields, fields=list(struct))
    )


def noise(kind: pa.DataType, n: int, rng: np.random.Generator) -> pa.Array:
    """A column of the kind: random numbers, small counts, short texts; else null."""
    if pa.types.is_floating(kind):
        return pa.array(rng.normal(size=n))
    if pa.types.is_integer(kind):
        return pa.array(rng.binomial(G, 0.05, size=n))
    if pa.types.is_boolean(kind):
        return pa.array(rng.random(n) < 0.1)
    if pa.types.is_string(kind):
        return pa.array(rng.integers(0, 10_000, size=n).astype(str))
    return pa.nulls(n, kind)


def measure(run: RunDir, n: int) -> dict[str, float]:
    """Wall and processor seconds and peak GiB of one `pivottrace triage`."""
    command = [sys.executable, "-m", "pivottrace_verl.cli", "triage", str(run.path)]
    command += ["--estimator", "pivot_density", "--budget", str(n // 4)]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as job:
        assert job.stdout is not None
        said = job.stdout.read().decode()
        _, status, used = os.wait4(job.pid, 0)
        seconds = time.perf_counter() - start
        job.returncode = os.waitstatus_to_exitcode(status)
    if job.returncode or run.plan().num_rows != n:
        raise SystemExit(f"triage of {n} prompts failed:\n{said}")
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),
        "peak_gib": round(used.ru_maxrss / 2**20, 3),
    }


def machine() -> dict[str, Any]:
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": model, "cores": os.cpu_count(), "memory_gib": round(memory, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", default="10000,100000,1000000")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]
    rows = []
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    for n in sizes:
        with tempfile.TemporaryDirectory() as folder:
            run = make_run(Path(folder) / "run", n)
            mib = (run.path / "scores.parquet").stat().st_size / 2**20
            runs = [measure(run, n) for _ in range(options.repeat)]
        row = {
            "prompts": n,
            "scores_mib": round(mib, 1),
            "seconds": float(np.median([r["seconds"] for r in runs])),
            "cpu_seconds": float(np.median([r["cpu_seconds"] for r in runs])),
            "peak_gib": max(r["peak_gib"] for r in runs),
            "runs": runs,
        }
        rows.append(row)
        print(
            f"{n:>9} prompts: {row['seconds']:6.2f} s ({row['cpu_seconds']:.2f} s of processor), "
            f"{row['peak_gib']:.2f} GiB",
            flush=True,
        )
    result = {
        "command": "pivottrace triage, interpreter and imports included; median of the runs",
        "limits": LIMITS,
        "estimators": [n for n in SCORE_SCHEMA.names if n.startswith("uncertainty/")],
        "machine": machine(),
        "note": f"load average {load:.1f} on {cores} cores at the start"
        + ("; wall time beyond processor time is mostly waiting" if load > 0.5 else ""),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("numpy", "pyarrow", "scipy")},
        },
        "sizes": rows,
    }
    write_json_atomic(options.out, result)


if __name__ == "__main__":
    main()
