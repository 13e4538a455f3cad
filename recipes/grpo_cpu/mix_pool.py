"""Makes the recipe's pool: problems with three numbers, and with two, which the policy masters.

    python recipes/grpo_cpu/mix_pool.py --out runs/grpo_cpu/data --three 384 160 --two 256 40

Contract: the files of `recipes/quickstart/make_pool.py`; problems with three numbers were never
shown to the policy, and pool and validation share none; the same arguments give the same bytes.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))
import make_pool
import pairs
import tasks

Sizes = tuple[int, int]
"""Problems for the pool and for validation."""


def mix(out: Path, three: Sizes, two: Sizes, seed: int) -> None:
    """Draw, mix and write.

    Raises:
        ValueError: there are fewer problems than asked for.
    """
    problems = pairs.problems(seed)
    if sum(two) > len(problems):
        raise ValueError(
            f"Countdown with two numbers gives {len(problems)} problems, not {sum(two)}."
        )
    hard = tasks.draw(sum(three), seed=seed, for_training=False)
    # The rarer problems are drawn last; pool and validation are to be of the same mix.
    rng = random.Random(seed)
    rng.shuffle(hard)
    pool = hard[: three[0]] + problems[: two[0]]
    rng.shuffle(pool)
    make_pool.write(out, pool, hard[three[0] :] + problems[two[0] : sum(two)])


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    for name in ("--three", "--two"):
        parser.add_argument(name, type=int, nargs=2, metavar=("POOL", "VAL"), required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    mix(args.out, tuple(args.three), tuple(args.two), args.seed)


if __name__ == "__main__":
    main()
