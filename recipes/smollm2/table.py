"""The recipe's tables, made from the committed result of a run.

python recipes/smollm2/table.py            prints them
python recipes/smollm2/table.py --write    puts them into recipes/smollm2/README.md
python recipes/smollm2/table.py --take runs/smollm2 --write    takes over a new run's result first
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from readme_table import command_line, digits

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "summary.json"
README = HERE / "README.md"


def tables(summary: dict[str, Any]) -> str:
    """Markdown: the run, the tasks, the estimators on the probes, and what follows from them."""
    judged = summary["judged"]
    lines = [
        *_run(summary),
        "",
        "How the policy does on the probes of each task; tokens, truncated and unparseable rollouts"
        " are of the whole task:",
        "",
        *_tasks(summary["tasks"]),
        "",
        f"{judged['probes']} probes, {judged['wrong_majorities']} with a wrong majority answer; "
        f"point and {judged['bootstrap']['level']:.0%} bootstrap interval, each estimator in the "
        "direction that the probes give it:",
        "",
        *_estimators(judged["estimators"]),
        "",
        *(f"- {sentence}" for sentence in judged["sentences"]),
    ]
    if summary["refused"]:
        lines.append(f"- Triage: {summary['refused']}")
    return "\n".join(lines)


def _run(summary: Mapping[str, Any]) -> list[str]:
    labels, score = summary["labels"], summary["score"]
    rows = [
        ("pool", f"{summary['pool']} prompts"),
        (
            "rollouts",
            f"{score['rollouts']} a prompt at T={score['temperature']:g}, at most "
            f"{score['max_tokens']} tokens",
        ),
        (
            "labels bought, probes included",
            f"{labels['bought']} ({labels['share']:.1%}), {labels['probes']} of them probes",
        ),
        ("ranked by", f"`{summary['estimator']}`"),
        ("routes", _counts(summary["routes"])),
        ("time, without the installation", f"{summary['seconds_total'] / 60:.1f} minutes"),
        ("of which", ", ".join(f"{k} {v:.0f} s" for k, v in summary["seconds"].items())),
        ("peak memory", f"{summary['peak_memory_gib']} GiB"),
    ]
    return [
        "| one run on 2 cores | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
    ]


def _tasks(tasks: list[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| task | prompts | probes | pass rate | majority right | solved by no, some, all rollouts "
        "| tokens | truncated | unparseable | routes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in tasks:
        cells = [
            row["task"],
            str(row["prompts"]),
            str(row["probes"]),
            digits(row["pass_rate"]),
            digits(row["majority_right"]),
            f"{row['never']}, {row['sometimes']}, {row['always']}",
            f"{row['length_mean']:.0f}",
            f"{row['truncated']:.0%}",
            f"{row['unparseable']:.0%}",
            _counts(row["routes"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _estimators(rows: list[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| estimator | more uncertain is | AUROC | within length terciles "
        "| Spearman with the pass rate | seconds a prompt |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"`{row['estimator']}`", row["direction"] or "-"]
        cells += [_interval(row[name]) for name in ("auroc", "auroc_within_length", "spearman")]
        lines.append(f"| {' | '.join([*cells, digits(row['seconds_per_prompt'])])} |")
    return lines


def _interval(value: Mapping[str, float | None]) -> str:
    if value["point"] is None:
        return "-"
    return f"{digits(value['point'])} [{digits(value['low'])}, {digits(value['high'])}]"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {route}" for route, n in sorted(counts.items()))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    command_line(__doc__, tables, result=RESULT, readme=README, name="smollm2", argv=argv)


if __name__ == "__main__":
    main()
