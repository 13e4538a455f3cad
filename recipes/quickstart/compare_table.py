"""The README's table of the compared plans, made from the committed result.

python recipes/quickstart/compare_table.py            prints it
python recipes/quickstart/compare_table.py --write    puts it into README.md
python recipes/quickstart/compare_table.py --take runs/compare    takes over a new result first
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from readme_table import command_line

HERE = Path(__file__).resolve().parent


def tables(summary: dict[str, Any]) -> str:
    """Markdown: an arm a row, one number a seed."""
    before = summary["before"]
    lines = [
        "| labels spent on | labels | mean of 4 at T=1, by seed | greedy, by seed |",
        "|---|---|---|---|",
        f"| nothing: before training | 0 | {before['mean']:.1%} | {before['greedy']:.1%} |",
    ]
    for arm in dict.fromkeys(row["arm"] for row in summary["arms"]):
        rows = [row for row in summary["arms"] if row["arm"] == arm]
        cells = (", ".join(f"{row[name]:.1%}" for row in rows) for name in ("mean", "greedy"))
        labels = ", ".join(dict.fromkeys(str(row["labels"]) for row in rows))
        lines.append(f"| {arm} | {labels} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    result = HERE / "results" / "compare.json"
    readme = HERE.parents[1] / "README.md"
    command_line(__doc__, tables, result=result, readme=readme, name="compare", argv=argv)


if __name__ == "__main__":
    main()
