"""The estimator report: numbers, sentences, picture."""

import json
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from pivottrace_verl.calibration import Outcome
from pivottrace_verl.estimator_report import assess, cost_per_prompt
from pivottrace_verl.evidence import gather
from pivottrace_verl.plan import TriageConfig
from pivottrace_verl.probe_statistics import auroc
from pivottrace_verl.report.estimator_picture import picture

STATISTICS = ("auroc", "auroc_within_length", "spearman", "aurc")


def report_on(made, **changed):
    return assess(made.scores, made.probes, TriageConfig(), draws=400, **changed)


def row_of(report, name):
    return next(row for row in report["estimators"] if row["estimator"] == name)


def told(report):
    return "\n".join(report["sentences"])


def test_where_nothing_is_informative_it_says_so_and_recommends_nothing(bed):
    report = report_on(bed("nothing"))
    assert "No estimator beats a random order" in told(report)
    assert "Recommended: none." in told(report)
    assert "would refuse the estimator 'pivot_density'" in told(report)
    assert "Pivots lose" not in told(report) and "Pivots beat" not in told(report)
    assert report["recommended"] is None


def test_where_only_consistency_knows_it_says_plainly_that_pivots_lose(bed):
    report = report_on(bed("consistency"))
    assert "Better than a random order: consistency" in told(report)
    assert "Recommended: consistency, higher = more uncertain" in told(report)
    assert "Pivots lose to something cheaper: pivot_" in told(report)
    assert "is below consistency by 0." in told(report)
    assert row_of(report, "consistency")["auroc"]["low"] > 0.7


def test_where_pivots_know_it_with_the_sign_flipped_it_says_which_way(bed):
    made = bed("pivots")
    report = report_on(made)
    bare = made.scores.drop_columns([n for n in made.scores.column_names if n[:9] == "features/"])
    without = assess(bare, made.probes, TriageConfig(), draws=100)
    assert "Recommended: pivot_density, lower = more uncertain, the opposite of" in told(without)
    assert "The probes confirm the estimator 'pivot_density'." in told(report)
    assert "Pivots beat what is cheaper: pivot_density is above length by" in told(report)
    row = row_of(report, "pivot_density")
    assert row["direction"] == "lower" and row["auroc"]["point"] > 0.8
    assert row["spearman"]["high"] < -0.4


def test_where_only_a_combination_knows_it_recommends_the_calibrated_one_with_its_weights(bed):
    report = report_on(bed("combination"))
    best = report["recommended"]["estimator"]
    assert best in ("calibrated", "calibrated_all")
    assert f"Recommended: {best}, higher" in told(report)
    assert len(report["fitted"]["calibrated"]["columns"]) == 10
    assert len(report["fitted"]["calibrated_all"]["columns"]) == 16
    assert report["choosing"]["spearman_out_of_fold"] < -0.6


def test_points_are_those_of_the_probes_and_lie_in_their_intervals(bed):
    made = bed("pivots")
    report, evidence = report_on(made), gather(made.scores, made.probes)
    wrong = evidence.probed.wrong
    for row in report["estimators"]:
        score = evidence.scores[row["estimator"]] * (-1 if row["direction"] == "lower" else 1)
        assert row["auroc"]["point"] == pytest.approx(auroc(score, wrong))
        for name in STATISTICS:
            value = row[name]
            assert value["low"] <= value["point"] + 0.02 and value["point"] <= value["high"] + 0.02
    assert report["random_order"]["aurc"] == pytest.approx(wrong.mean())
    assert row_of(report, "pivot_density")["aurc"]["high"] < report["random_order"]["aurc"]


def test_the_report_is_json_and_repeats_with_its_seed(bed):
    made = bed("consistency")
    one, again, other = report_on(made), report_on(made), report_on(made, seed=1)
    assert json.dumps(one, allow_nan=False) == json.dumps(again)
    assert row_of(one, "entropy")["auroc"] != row_of(other, "entropy")["auroc"]
    assert one["recommended"] == other["recommended"]


def test_an_estimator_that_is_not_scored_stays_in_the_table_without_numbers(bed):
    made = bed("consistency")
    rows = [{**row, "uncertainty/nll": None} for row in made.scores.to_pylist()]
    report = assess(rows, made.probes, TriageConfig(), draws=50)
    row = row_of(report, "nll")
    assert not row["measured"] and row["n"] == 0 and row["direction"] is None
    assert all(row[name] == {"point": None, "low": None, "high": None} for name in STATISTICS)
    assert picture(report).count(b"not scored") == 1
    assert report["recommended"]["estimator"] == "consistency"


def test_what_is_not_scored_is_told_with_the_option_that_would(bed):
    made = bed("consistency")
    unknown = {"uncertainty/entropy": None, "uncertainty/nll": None}
    rows = [{**row, **unknown} for row in made.scores.to_pylist()]
    report = assess(rows, made.probes, TriageConfig(), draws=50)
    (told,) = (line for line in report["sentences"] if line.startswith("Not scored"))
    assert told.endswith(
        "entropy, nll; entropy would need `pivottrace score --capture on` or `--capture replay`."
    )


def test_pivots_are_compared_on_the_probes_that_have_both_scores(bed):
    made = bed("consistency")
    known = np.arange(400) % 2 == 0
    rows = made.scores.to_pylist()
    for row, kept in zip(rows, known, strict=True):
        if not kept:
            row["uncertainty/pivot_density"] = row["uncertainty/pivot_count"] = None
    report = assess(rows, made.probes, TriageConfig(), draws=200)
    both = sum(known[int(o.pt_id[1:])] for o in made.probes)
    assert {c["n"] for c in report["comparisons"]} == {both}
    assert row_of(report, "pivot_count")["n"] == both


def test_probes_of_one_class_leave_auroc_undefined_and_say_so(bed):
    made = bed("consistency")
    probes = [Outcome(o.pt_id, o.pass_rate, True) for o in made.probes]
    report = assess(made.scores, probes, TriageConfig(), draws=50)
    assert "All 64 majorities are right" in told(report)
    assert "Pivots could not be compared" in told(report)
    assert set(report["not_offered"]) == {"calibrated", "calibrated_all"}
    assert row_of(report, "consistency")["auroc"] == {"point": None, "low": None, "high": None}
    assert report["recommended"]["estimator"] == "consistency"
    picture(report)
    json.dumps(report, allow_nan=False)


def test_costs_come_from_the_timings_and_a_second_pass_is_on_top():
    names = ["entropy", "coe", "random"]
    manifest = {"pool": {"n_prompts": 100}, "timings": {"score": 50.0}}
    assert cost_per_prompt(manifest, names) == {"entropy": 0.5, "coe": None, "random": 0.0}
    split = {"score_generating": 40.0, "score_own": 2.0, "score_hidden_states": 0.0}
    manifest["timings"] |= split
    assert cost_per_prompt(manifest, names) == {"entropy": 0.42, "coe": None, "random": 0.0}
    manifest["timings"]["score_hidden_states"] = 20.0
    assert cost_per_prompt(manifest, names)["coe"] == pytest.approx(0.62)
    manifest["timings"]["score_replay"] = 30.0
    costs = cost_per_prompt(manifest, [*names, "consistency"])
    assert costs["entropy"] == pytest.approx(0.72) and costs["consistency"] == pytest.approx(0.42)
    assert costs["coe"] == pytest.approx(0.62)
    assert cost_per_prompt({}, names) == {"entropy": None, "coe": None, "random": 0.0}


def test_the_picture_is_one_svg_with_a_mark_for_every_number_and_no_request(bed):
    made = bed("pivots")
    report = report_on(made)
    svg = picture(report)
    root = ET.fromstring(svg)
    marks = [e for e in root.iter() if e.tag.endswith("circle")]
    assert len(marks) == 4 * len(report["estimators"])
    texts = [e.text for e in root.iter() if e.tag.endswith("text")]
    assert any(text.startswith("pivot_density ") for text in texts)
    assert b"href" not in svg and b"url(" not in svg and b"<script" not in svg


def test_an_estimators_odd_name_is_escaped_in_the_picture(bed):
    made = bed("nothing")
    names = [n.replace("nll", "<b>&") for n in made.scores.column_names]
    report = assess(made.scores.rename_columns(names), made.probes, TriageConfig(), draws=20)
    assert b"<b>" not in picture(report)
