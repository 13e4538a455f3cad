"""The recipe's tables, made from its committed result, and the picture beside it.

python recipes/grpo_cpu/curves_table.py            prints them
python recipes/grpo_cpu/curves_table.py --write    puts them into the README, draws curves.svg
python recipes/grpo_cpu/curves_table.py --take runs/grpo_cpu    takes over a result first
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from arms import ARMS, final, reached
from picture import curves_of, mean_curve, picture
from readme_table import command_line

HERE = Path(__file__).resolve().parent


def tables(summary: dict[str, Any]) -> str:
    """Markdown: what each arm cost and reached, its curve, and how it compares."""
    curves = curves_of(summary)
    target = sum(map(final, curves["full"])) / len(curves["full"]) if "full" in curves else None
    lines = [
        "| arm | labels bought | final accuracy, by seed | with two numbers "
        "| steps to full supervision's final accuracy | labels asked for by then | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, seeds in curves.items():
        rows = [row for row in summary["arms"] if row["arm"] == arm]
        at = None if target is None else reached(seeds, target)
        cells = [
            ARMS[arm].title,
            _each(f"{row['labels']['bought']} ({row['labels']['share']:.0%})" for row in rows),
            ", ".join(f"{final(points):.1%}" for points in seeds),
            ", ".join(f"{final(points, 'two'):.0%}" for points in seeds),
            *(("-", "-") if at is None else (str(at["step"]), str(at["labels"]))),
            ", ".join(f"{row['seconds'] / 60:.1f}" for row in rows),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    steps = [point["step"] for point in next(iter(curves.values()))[0]]
    lines += [
        "",
        f"| mean of the seeds after step | {' | '.join(map(str, steps))} |",
        "|---" * (len(steps) + 1) + "|",
    ]
    for arm, seeds in curves.items():
        values = (f"{value:.1%}" for value in mean_curve(seeds, "three"))
        lines.append(f"| {ARMS[arm].title} | {' | '.join(values)} |")
    return "\n".join([*lines, "", *(f"- {sentence}" for sentence in sentences(summary))])


def for_readme(summary: dict[str, Any]) -> str:
    """The picture and the tables."""
    return f"![Validation accuracy by steps and by labels](results/curves.svg)\n\n{tables(summary)}"


def sentences(summary: dict[str, Any]) -> Iterator[str]:
    """How far to trust the table, what triage did, and PivotTrace against each other arm."""
    curves = curves_of(summary)
    start = [points[0]["three"] for seeds in curves.values() for points in seeds]
    noise = max(start) - min(start)
    yield (
        f"Step 0 is one and the same policy in all {len(start)} runs, yet measured between "
        f"{min(start):.1%} and {max(start):.1%}: differences up to {100 * noise:.1f} points are "
        "noise of the measurement alone, and training adds its own."
    )
    for row in summary["arms"]:
        if row["estimator"] is not None:
            routes = ", ".join(f"{n} {route}" for route, n in row["routes"].items())
            yield f"Triage with seed {row['seed']} ranked by `{row['estimator']}`: {routes}."
    found = {(row["arm"], row["seed"]): final(row["curve"]) for row in summary["arms"]}
    for arm in ARMS:
        seeds = [s for a, s in found if a == arm and ("pivottrace", s) in found]
        if arm != "pivottrace" and seeds:
            gaps = [100 * (found["pivottrace", s] - found[arm, s]) for s in seeds]
            each = ", ".join(f"{gap:+.1f}" for gap in gaps)
            mean = sum(gaps) / len(gaps)
            verdict = (
                "ahead" if mean > 100 * noise else "behind" if mean < -100 * noise else "level"
            )
            yield (
                f"PivotTrace against '{ARMS[arm].title}' at the end: {each} points by seed, "
                f"{verdict} by that measure."
            )


def _each(texts: Iterator[str]) -> str:
    """Texts that are equal once."""
    return ", ".join(dict.fromkeys(texts))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    command_line(
        __doc__, for_readme, result=HERE / "results" / "summary.json", readme=HERE / "README.md",
        name="grpo-cpu", argv=argv, picture=("curves.svg", picture),
    )  # fmt: skip


if __name__ == "__main__":
    main()
