"""The report's parts: verdicts, metrics, choice of examples, ticks."""

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pivottrace_verl.report.charts import composition, learning_curves, lines
from pivottrace_verl.report.heatmap import LEVELS, TracedRollout, choose, heat, visible
from pivottrace_verl.report.learning import Learning, read_metrics, smooth
from pivottrace_verl.report.numbers import finite
from pivottrace_verl.report.svg import Plot, span, ticks
from pivottrace_verl.report.verdict import contest, standard_error, zone


def make_view(**auroc: float | None) -> dict[str, Any]:
    table = [
        {
            "estimator": name,
            "n": 40,
            "auroc": value,
            "auroc_within_length": value,
            "spearman": -0.3,
            "direction": "lower" if value is not None and value < 0.5 else "higher",
        }
        for name, value in auroc.items()
    ]
    probes = [{"majority_right": i % 2 == 0} for i in range(40)]
    return {"table": table, "probes": probes, "estimator": "pivot_count", "triaged": True}


@pytest.mark.parametrize(
    ("auroc", "winners", "sentence"),
    [
        ({"pivot_count": 0.9, "entropy": 0.8}, ["pivot_count"], "Pivots are the best here"),
        ({"pivot_count": 0.7, "entropy": 0.8}, ["entropy"], "Pivots are not the best here"),
        ({"pivot_count": 0.7, "random": 0.72}, ["random"], "Pivots are not the best here"),
        (
            {"pivot_count": 0.8, "entropy": 0.8},
            ["entropy", "pivot_count"],
            "Pivots share the best place here with entropy",
        ),
        ({"pivot_count": 0.2, "entropy": 0.7}, ["pivot_count"], "Pivots are the best here"),
        ({"entropy": 0.7}, ["entropy"], "Pivots were not scored; entropy is the best"),
        ({"pivot_count": None, "entropy": None}, [], "The probes cannot tell the scores apart"),
    ],
)
def test_the_verdict_on_pivots_is_read_off_the_table(
    auroc: dict[str, float | None], winners: list[str], sentence: str
) -> None:
    found = contest(make_view(**auroc))
    assert found["winners"] == winners
    assert found["sentence"].startswith(sentence)
    assert [row["name"] for row in found["rows"] if row["winner"]] == winners
    assert found["pivots_best"] == (winners == ["pivot_count"])


def test_a_score_that_runs_backwards_is_read_in_its_own_direction() -> None:
    (row,) = contest(make_view(pivot_count=0.2))["rows"]
    assert row["auroc"] == pytest.approx(0.8) and row["direction"] == "lower"


def test_the_standard_error_shrinks_with_more_probes() -> None:
    assert standard_error(0.8, 100, 100) < standard_error(0.8, 20, 20) < 0.2
    assert standard_error(1.0, 5, 5) == 0.0


def test_zones_follow_the_thresholds_and_mistrust_wins_where_they_meet() -> None:
    curve = {"u_low": 0.3, "u_high": 0.6}
    assert [zone(u, curve) for u in (0.3, 0.4, 0.6)] == ["drop", "self_train", "annotate"]
    assert zone(0.3, {"u_low": 0.3, "u_high": 0.3}) == "annotate"
    assert zone(0.9, {"u_low": None, "u_high": None}) == "self_train"


def test_a_torn_line_is_counted_and_a_repeated_step_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 2, "data": {"a": 5.0}}\n'
        '{"step": 1, "data": {"a": 1.0, "b": NaN, "c": "text"}}\n'
        '{"step": 2, "da{"step": 9, "data": {"a": 1}}\n'
        '{"step": 2, "data": {"a": 2.0}}\n'
        '{"step": 3, "dat'
    )
    learning = read_metrics(path)
    assert learning.series == {"a": [(1, 1.0), (2, 2.0)]}
    assert learning.torn == 2
    assert read_metrics(tmp_path / "none.jsonl") == Learning()


def test_group_shares_add_up_whether_counts_or_shares_were_logged() -> None:
    logged = {"all_right": [(1, 2.0), (2, 0.0)], "mixed": [(1, 1.0), (2, 0.0)]}
    series = {f"pivottrace/annotate/{k}": v for k, v in logged.items()}
    series["pivottrace/annotate/all_wrong"] = [(1, 1.0), (2, 0.0)]
    shares = Learning(series).shares("annotate")
    assert shares == {
        "all_right": [(1, 0.5)],
        "mixed": [(1, 0.25)],
        "all_wrong": [(1, 0.25)],
    }
    assert composition(Learning(series), "annotate").svg
    assert not composition(Learning(series), "self_train").svg


def test_an_empty_log_leaves_every_chart_out_with_a_note() -> None:
    charts = learning_curves(Learning())
    assert len(charts) == 7
    assert all(not chart.svg and "not logged" in chart.note for chart in charts)


def test_a_partly_logged_chart_names_what_it_lacks() -> None:
    chart = lines("T", [("a", "one", [(1, 0.5)]), ("b", "two", [])], "y", missing="-")
    assert chart.svg and chart.note == "two: not logged."


def test_smoothing_keeps_the_steps_and_a_constant() -> None:
    points = [(step, 2.0) for step in range(12)]
    assert smooth(points) == points


@given(st.dictionaries(st.text("abc", min_size=1), st.floats(0, 1), max_size=40))
def test_examples_are_distinct_and_ordered_from_low_to_high(u: dict[str, float]) -> None:
    chosen = choose(u)
    assert len(chosen) == len({pt_id for pt_id, _ in chosen}) == min(7, len(u))
    assert [u[pt_id] for pt_id, _ in chosen] == sorted(u[pt_id] for pt_id, _ in chosen)
    bands = [band for _, band in chosen]
    assert bands == sorted(bands, key=["low", "middle", "high"].index)
    if len(u) >= 3:
        assert set(bands) == {"low", "middle", "high"}


def make_rollout(change: list[float], pivots: list[int]) -> TracedRollout:
    x = np.asarray(change)
    return TracedRollout(0, 1, None, ["t"] * len(change), x, x, pivots)


def test_a_change_of_tau_lies_in_the_middle_of_the_scale() -> None:
    tokens = heat(make_rollout([0.0, 0.09, 0.1, 0.2, 5.0], [4]), tau=0.1)
    assert [t.level for t in tokens] == [0, 3, LEVELS // 2, LEVELS, LEVELS]
    assert [t.pivot for t in tokens] == [False, False, False, False, True]
    assert tokens[4].title == "token 4: signal 5.0000, change 5.0000, pivot"


def test_a_tau_of_zero_still_has_a_scale() -> None:
    assert [t.level for t in heat(make_rollout([0.0, 1.0], []), tau=0.0)] == [0, LEVELS // 2]


def test_line_ends_and_empty_tokens_are_visible() -> None:
    assert visible("a\n") == "a↵\n" and visible("") == "∅"


@given(
    st.floats(-1e6, 1e6, allow_subnormal=False),
    st.floats(1e-6, 1e6, allow_subnormal=False),
    st.integers(1, 10),
)
def test_ticks_lie_inside_the_range_in_even_steps(low: float, width: float, about: int) -> None:
    high = low + width
    found = ticks(low, high, about)
    assert len(found) <= about + 2
    slack = 1e-6 * max(width, abs(low) * 1e-3)
    assert all(low - slack <= t <= high + slack for t in found)
    steps = np.diff(found)
    assert steps.size == 0 or np.ptp(steps) <= 1e-6 * max(1.0, abs(low))


@given(st.lists(st.floats(), max_size=5))
def test_a_span_is_never_empty(values: list[float]) -> None:
    low, high = span(values)
    assert low < high or not math.isfinite(high - low)


def test_a_gap_in_the_numbers_is_a_gap_in_the_line() -> None:
    plot = Plot("alt", (0, 3), (0, 1))
    plot.line([0, 1, 2, 3], [0.1, math.nan, 0.2, 0.3], "x")
    path = ET.fromstring(plot.markup()).find("path")
    assert path is not None
    assert path.attrib["d"].count("M") == 2 and "nan" not in path.attrib["d"]


def test_numbers_that_do_not_exist_become_null() -> None:
    assert finite({"a": (math.nan, [math.inf, 1.0])}) == {"a": [None, [None, 1.0]]}
