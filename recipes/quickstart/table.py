"""The README's tables, made from the committed result of a quickstart run.

python recipes/quickstart/table.py            prints them
python recipes/quickstart/table.py --write    puts them into README.md
python recipes/quickstart/table.py --take runs/quickstart    takes over a new run's result first
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from readme_table import command_line, digits

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "summary.json"
README = HERE.parents[1] / "README.md"


def tables(summary: dict[str, Any]) -> str:
    """Markdown of what happened and of the estimators on the probes."""
    before, after = (summary["validation"][when] for when in ("before", "after"))
    labels, seconds = summary["labels"], summary["seconds"]
    rows = [
        ("pool", f"{summary['pool']} prompts"),
        (
            "labels bought, probes included",
            f"{labels['bought']} ({labels['share']:.1%}), {labels['probes']} of them probes",
        ),
        ("routes", ", ".join(f"{n} {route}" for route, n in summary["routes"].items())),
        ("ranked by", f"`{summary['estimator']}`"),
        ("GRPO steps", str(summary["steps"])),
        (
            f"validation, mean of {before['samples']} at T=1",
            f"{before['mean']:.1%} -> {after['mean']:.1%}",
        ),
        ("validation, greedy", f"{before['greedy']:.1%} -> {after['greedy']:.1%}"),
        ("time, without the installation", f"{summary['seconds_total'] / 60:.1f} minutes"),
        ("of which", ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())),
        ("peak memory", f"{summary['peak_memory_gib']} GiB"),
    ]
    lines = ["| one run on 2 cores | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    lines += [
        "",
        f'AUROC for "the majority answer is wrong" on the {labels["probes"]} probes, as scored'
        + (" (the method's own estimator was refused):" if summary["refused"] else ":"),
        "",
        "| estimator | AUROC | within length terciles | Spearman with the pass rate |",
        "|---|---|---|---|",
    ]
    for row in (row for row in summary["estimators"] if row["n"]):
        cells = (digits(row[k]) for k in ("auroc", "auroc_within_length", "spearman"))
        lines.append(f"| {row['estimator']} | {' | '.join(cells)} |")
    if summary["refused"]:
        lines += ["", f"The probes' verdict: {summary['refused']}"]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    command_line(__doc__, tables, result=RESULT, readme=README, name="quickstart", argv=argv)


if __name__ == "__main__":
    main()
