import json
from pathlib import Path

import compare
import compare_table
import pytest
import table

from pivottrace_verl.plan import TriageConfig

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.mark.parametrize("script", [table, compare_table])
def test_the_readme_shows_the_committed_result(script):
    result = Path(script.__file__).parent / "results"
    name = {table: "summary.json", compare_table: "compare.json"}[script]
    assert script.tables(json.loads((result / name).read_text())) in README.read_text()


def test_the_arms_differ_in_how_the_budget_is_spent_only():
    for _, how in compare.ARMS.values():
        assert not how or (how[0] == "--priority" and TriageConfig(priority=how[1]))


def test_the_summary_holds_the_arms_that_are_done_in_their_order(tmp_path):
    for folder, arm, seed in (("a", "random", 1), ("b", "random", 0), ("c", "all prompts", 0)):
        (tmp_path / folder).mkdir()
        row = {"arm": arm, "seed": seed, "labels": 2, "mean": 0.5, "greedy": 0.25}
        (tmp_path / folder / "arm.json").write_text(json.dumps(row))
    (tmp_path / "unfinished").mkdir()
    before = {"mean": 0.1, "greedy": 0.2, "samples": 4}
    found = compare.summary(tmp_path, before)
    assert [(r["arm"], r["seed"]) for r in found["arms"]] == [
        ("random", 0),
        ("random", 1),
        ("all prompts", 0),
    ]
    made = compare_table.tables(found)
    assert "| random | 2 | 50.0%, 50.0% | 25.0%, 25.0% |" in made
    assert "| nothing: before training | 0 | 10.0% | 20.0% |" in made
