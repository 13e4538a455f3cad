"""Makes the quickstart's pool, its validation set, and the answers that only the oracle may read.

    python recipes/quickstart/make_pool.py --out runs/data [--n-pool 640] [--n-val 200] [--seed 0]

Contract: `pool.jsonl` holds prompts without any answer, `val.jsonl` the same columns and `label`,
`answers.jsonl` the pool's labels by `pt_id`. All problems are distinct, none was shown to the
policy in its training, and the same arguments give the same bytes.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import tasks

from pivottrace_verl.files import write_bytes_atomic
from pivottrace_verl.prompts import pt_id

DATA_SOURCES = {3: "countdown", 2: "countdown_two"}
"""By how many numbers a problem gives."""


def row(instance: tasks.Instance) -> dict[str, Any]:
    """A prompt as verl's rows have it; nothing in it gives the answer away."""
    return {
        "prompt": [{"role": "user", "content": instance.prompt}],
        "data_source": DATA_SOURCES[len(instance.numbers)],
        "extra_info": {"numbers": list(instance.numbers), "target": instance.target},
    }


def make(out: Path, n_pool: int, n_val: int, seed: int) -> None:
    """The three files in `out`, each written whole."""
    instances = tasks.draw(n_pool + n_val, seed=seed, for_training=False)
    # The rarer problems are drawn last; pool and validation are to be of the same mix.
    random.Random(seed).shuffle(instances)
    write(out, instances[:n_pool], instances[n_pool:])


def write(out: Path, pool: list[tasks.Instance], validation: list[tasks.Instance]) -> None:
    """Pool, validation and the oracle's answers in `out`, each file written whole."""
    pool_rows = [row(i) for i in pool]
    answers = [
        {"pt_id": pt_id(r["prompt"], r["data_source"]), "label": tasks.label(i)}
        for r, i in zip(pool_rows, pool, strict=True)
    ]
    _write(out / "pool.jsonl", pool_rows)
    _write(out / "val.jsonl", [{**row(i), "label": tasks.label(i)} for i in validation])
    _write(out / "answers.jsonl", answers)
    print(f"wrote {out}: {len(pool)} prompts for the pool, {len(validation)} for validation")


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(r, sort_keys=True) + "\n" for r in rows)
    write_bytes_atomic(path, text.encode())


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make the quickstart's pool of prompts.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n-pool", type=int, default=640)
    parser.add_argument("--n-val", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    make(args.out, args.n_pool, args.n_val, args.seed)


if __name__ == "__main__":
    main()
