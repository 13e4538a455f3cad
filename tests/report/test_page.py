"""The page as a whole: every stage, nothing from outside, nothing unescaped, numbers twice."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.pivots import DetectorConfig, find_pivots
from pivottrace_verl.planning import make_plan
from pivottrace_verl.pool import RunDir
from pivottrace_verl.report import heatmap, write_report
from pivottrace_verl.triage import TriageConfig

Make = Callable[..., RunDir]
NOW = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
HOSTILE = "<script>alert('x')</script>\"&"
VOID = {"meta", "link", "br", "img", "hr"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def written(run: RunDir) -> tuple[Page, dict]:
    path = write_report(run, now=NOW)
    text = path.read_text(encoding="utf-8")
    strict = {"parse_constant": lambda name: pytest.fail(f"{name} in report.json")}
    return Page(text), json.loads(path.with_suffix(".json").read_text(), **strict)


@pytest.mark.parametrize(
    ("upto", "todo"),
    [
        ("new", ["score", "probe", "triage", "annotate", "train"]),
        ("score", ["probe", "triage", "annotate", "train"]),
        ("probe", ["triage", "annotate", "train"]),
        ("triage", ["annotate", "train"]),
        ("annotate", ["train"]),
        ("train", []),
    ],
)
def test_the_report_works_at_every_stage_and_names_what_is_not_done(
    make: Make, upto: str, todo: list[str]
) -> None:
    page, numbers = written(make(upto=upto))
    assert [stage["name"] for stage in numbers["stages"] if not stage["done"]] == todo
    if todo:
        assert f"This run is not finished: {', '.join(todo)} not done yet." in page.text
    else:
        assert "went from 31.0% to 47.0%" in page.text
        assert "31.0% → 47.0%" in page.text


def test_the_page_asks_for_nothing_and_runs_nothing(make: Make) -> None:
    run = make()
    page, _ = written(run)
    assert not [tag for tag, _ in page.tags if tag in ("script", "img", "iframe", "object", "base")]
    links = [a[k] for _, a in page.tags for k in ("href", "src", "xlink:href") if k in a]
    assert links == ["data:,"]
    text = (run.path / "report.html").read_text()
    assert "url(" not in text and "@import" not in text and "http" not in text.replace("http-e", "")
    assert not [key for _, a in page.tags for key in a if key.startswith("on")]


def test_prompts_tokens_answers_and_sources_are_escaped(make: Make) -> None:
    run = make(hostile=HOSTILE)
    page, numbers = written(run)
    assert "<script" not in (run.path / "report.html").read_text().lower()
    assert "script" not in {tag for tag, _ in page.tags}
    example = numbers["examples"][0]
    assert HOSTILE in example["data_source"] and HOSTILE in example["answer"]
    for shown in (example["data_source"], example["answer"], f"5. {HOSTILE}", f"try 3{HOSTILE}"):
        assert shown in page.text
    alts = " ".join(a["aria-label"] or "" for tag, a in page.tags if tag == "svg")
    assert f"countdown{HOSTILE}" in alts


def test_every_drawing_has_a_text_alternative(make: Make) -> None:
    page, _ = written(make())
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(drawings) == 1 + 7 + 7
    assert all(a["role"] == "img" and a["aria-label"] for a in drawings)


def test_report_json_holds_the_numbers_of_the_run_files(make: Make) -> None:
    run = make()
    _, numbers = written(run)
    plan, triage = run.plan().to_pylist(), run.triage()
    assert {row["route"]: row["count"] for row in numbers["routes"]} == triage["routes"]
    assert sum(row["count"] for row in numbers["routes"]) == len(plan) == 100
    assert numbers["pool"]["duplicates_merged"] == 1
    assert numbers["labels"]["total"] == len(run.ledger().labels())
    assert numbers["labels"]["probe"] == 48
    assert numbers["calibration"]["u_high"] == triage["curve"]["u_high"]
    u = {row["pt_id"]: row["uncertainty"] for row in plan}
    assert all(probe["u"] == u[probe["pt_id"]] for probe in numbers["calibration"]["probes"])
    assert len(numbers["calibration"]["probes"]) == 48
    assert sum(row["probes"] for row in numbers["routes"]) == 48
    assert numbers["written"] == "2026-01-02 03:04 UTC"


def test_the_same_run_gives_the_same_bytes(make: Make, tmp_path: Path) -> None:
    run = make(upto="triage")
    first = write_report(run, tmp_path / "a.html", now=NOW)
    second = write_report(run, tmp_path / "b.html", now=NOW)
    assert first.read_bytes() == second.read_bytes()
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_the_report_changes_no_file_of_the_run(make: Make, tmp_path: Path) -> None:
    run = make()
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    write_report(run, tmp_path / "out.html", now=NOW)
    assert {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()} == before


def test_absent_metrics_leave_their_chart_out_with_a_line(make: Make) -> None:
    page, _ = written(make(drop_keys=("missed", "agreement", "accuracy", "all_wrong")))
    for title in ("Rollouts without a trace", "Agreement and pseudo-labels", "Groups of annotate"):
        assert f"Left out: “{title}" in page.text
    assert "Left out: “Validation" not in page.text


def test_a_refusal_is_quoted_with_the_curve_that_led_to_it(make: Make) -> None:
    page, numbers = written(make(upto="probe", best="entropy", pivots_informative=False))
    assert "Triage refuses this ranking." in page.text
    assert "'pivot_count' (direction higher) does not tell where the policy fails" in page.text
    assert numbers["calibration"]["best"] == "entropy"
    assert numbers["estimators"]["winners"] == ["entropy"]
    assert len(numbers["calibration"]["curve"]["u"]) > 1
    assert "refuses this ranking" in {stage["detail"] for stage in numbers["stages"]}
    assert not [a for _, a in page.tags if (a.get("class") or "").startswith("band")]


def test_a_refused_estimator_is_named_beside_the_one_that_took_its_place(make: Make) -> None:
    run = make(upto="triage", best="entropy", pivots_informative=False)
    run.write_plan(run.plan().to_pylist(), {**run.triage(), "refused": "Pivots say nothing."})
    page, numbers = written(run)
    assert "Triage refused the ranking first asked for. Pivots say nothing." in page.text
    assert "The plan was made with entropy." in page.text
    assert numbers["routes"] and "every prompt has a route" in page.text


def test_validation_figures_are_read_before_there_is_a_summary(make: Make) -> None:
    run = make(upto="annotate")
    before = {"mean": 0.2, "greedy": 0.3, "samples": 4}
    path = run.path / "validation.json"
    path.write_text(json.dumps({"before": before}))
    assert written(run)[1]["result"] is None
    path.write_text(json.dumps({"before": before, "after": {"mean": 0.4, "greedy": 0.5}}))
    page, numbers = written(run)
    assert numbers["result"]["source"] == "validation.json"
    assert "Validation accuracy (mean of 4) went from 20.0% to 40.0%" in page.text


def test_majorities_are_judged_by_bought_labels_only(make: Make) -> None:
    run = make()
    labels = run.ledger().labels()
    _, numbers = written(run)
    verdicts = {e["pt_id"]: e["majority_right"] for e in numbers["examples"]}
    assert {pt_id for pt_id, right in verdicts.items() if right is None} == set(verdicts) - set(
        labels
    )
    assert set(verdicts) - set(labels) and set(verdicts) & set(labels)


def test_the_pivots_shown_are_those_the_detector_finds(make: Make) -> None:
    run = make()
    page, numbers = written(run)
    detector = DetectorConfig.from_dict(run.manifest["detector"])
    traces = load_file(run.path / "traces" / "part-00000.safetensors")
    assert [e["band"] for e in numbers["examples"]] == [
        *["low"] * 2,
        *["middle"] * 3,
        *["high"] * 2,
    ]
    for example in numbers["examples"]:
        trace = traces[f"{example['pt_id']}/{example['rollout']}"]
        assert example["pivots"] == find_pivots(trace, detector).tolist()
    marked = [a for tag, a in page.tags if tag == "span" and "pivot" in (a.get("class") or "")]
    total = sum(len(e["pivots"]) for e in numbers["examples"])
    assert total > 0
    assert len(marked) == total + 1  # The scale shows one.
    titles = [a["title"] for a in marked if "title" in a]
    assert len(titles) == total
    assert all("signal " in (t or "") and (t or "").endswith(", pivot") for t in titles)


def test_traces_of_another_length_than_their_tokens_are_refused(make: Make) -> None:
    run = make(upto="score")
    path = run.path / "traces" / "part-00000.json"
    texts = json.loads(path.read_text())
    for entry in texts.values():
        entry["tokens"] = entry["tokens"][:-1]
    path.write_text(json.dumps(texts))
    with pytest.raises(PivotTraceError, match="has 90 rows, but its JSON has 89 tokens"):
        write_report(run)
    assert not (run.path / "report.html").exists()


def test_long_rollouts_are_cut_and_the_page_says_so(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heatmap, "MAX_TOKENS", 50)
    page, _ = written(make(upto="score"))
    assert "40 more tokens are not drawn." in page.text


def test_without_traces_the_page_says_so(make: Make) -> None:
    run = make(upto="score")
    for path in (run.path / "traces").iterdir():
        path.unlink()
    page, numbers = written(run)
    assert numbers["examples"] == []
    assert "No traces are kept in this run" in page.text


def test_a_plan_made_from_other_scores_is_refused(make: Make) -> None:
    run = make(upto="triage")
    rows = run.scores().to_pylist()
    rows[0]["length_mean"] += 1
    run.write_score_part(0, rows)
    run.merge_scores()
    with pytest.raises(PivotTraceError, match="made from the scores"):
        write_report(run)


def test_prompts_set_apart_for_review_are_a_route_and_their_probes_are_not_in_the_curve(
    make: Make,
) -> None:
    run = make(upto="probe")
    probes = run.probes()
    rows = run.scores().to_pylist()
    broken = set(probes["pt_ids"][:5])
    run.write_score_part(0, [{**r, "truncated": 8 * (r["pt_id"] in broken)} for r in rows])
    run.merge_scores()
    run.write_probes(probes["estimator"], 0, probes["pt_ids"])
    _, before = written(run)
    assert len(before["calibration"]["probes"]) == 43
    plan, info = make_plan(run, TriageConfig(estimator="pivot_count"))
    run.write_plan(plan.rows, info)
    page, numbers = written(run)
    assert {row["route"]: row["count"] for row in numbers["routes"]}["review"] == 5
    assert len(numbers["calibration"]["probes"]) == numbers["calibration"]["curve"]["probes"] == 43
    assert "every prompt has a route, 5 to review" in page.text


def test_the_sliding_means_lie_in_bands_of_their_bootstrap_intervals(make: Make) -> None:
    page, numbers = written(make(upto="triage"))
    curve = numbers["calibration"]["curve"]
    n = len(curve["u"])
    for key in "pm":
        (path,) = [a["d"] for _, a in page.tags if a.get("class") == f"area interval curve-{key}"]
        corners = [tuple(map(float, at.split())) for at in str(path).strip("MZ").split("L")]
        assert len(corners) == 2 * n
        # There along the upper end, back along the lower one; down the page is down in y.
        assert all(corners[i][1] <= corners[-1 - i][1] for i in range(n))
        ends = zip(curve[f"{key}_low"], curve[key], curve[f"{key}_high"], strict=True)
        assert sum(low <= value <= high for low, value, high in ends) > 0.9 * n
    assert "95% intervals of the sliding means, 400 bootstrap draws" in page.text
