"""Several annotators, rounds, bad rows, costs: what an import books and what it tells."""

import json
import time

import pytest

from pivottrace_verl.annotation import export_queue, import_labels, waiting
from pivottrace_verl.annotation.checks import check_labels, to_check
from pivottrace_verl.annotation.status import status
from pivottrace_verl.errors import PivotTraceError

from .conftest import ids_of, write_plan


def write_csv(path, rows, columns=("pt_id", "label")):
    lines = [",".join(columns), *(",".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def said(path, *rows):
    """(pt_id, annotator, label) rows of several annotators."""
    return write_csv(path, rows, ("pt_id", "annotator", "label"))


# Several annotators


@pytest.mark.parametrize(
    ("rule", "label", "open_"),
    [("majority", "4", False), ("first", "5", False), ("unanimous", None, True)],
)
def test_annotators_who_differ_are_listed_and_settled_by_the_rule(
    make_run, tmp_path, rule, label, open_
):
    run = make_run(3)
    a, b, _ = ids_of(run)
    rows = [(a, "ana", "5"), (a, "bo", "4"), (a, "cy", "4"), (b, "ana", "1"), (b, "bo", "1")]
    result = import_labels(run, said(tmp_path / "q.csv", *rows), "nobody", rule=rule)
    assert run.ledger().labels().get(a) == label
    assert run.ledger().labels()[b] == "1"
    (dispute,) = result.disputes
    assert dispute.said == [("ana", "5"), ("bo", "4"), ("cy", "4")]
    assert dispute.resolved == label
    assert (result.agreement.prompts, result.agreement.pairs) == (2, 4)
    assert result.agreement.agreement == 0.5
    assert len(status(run)["conflicts"]) == open_
    assert json.loads(json.dumps(result.to_dict()))["disputes"][0]["pt_id"] == a


def test_a_tie_gives_no_label_stays_in_the_queue_and_is_settled_by_one_more(make_run, tmp_path):
    run = make_run(2)
    a, b = ids_of(run)
    path = said(tmp_path / "q.csv", (a, "ana", "5"), (a, "bo", "4"))
    result = import_labels(run, path, "nobody")
    assert (result.added, [d.pt_id for d in result.open_disputes()]) == (0, [a])
    assert "1 of which stay open" in result.sentence() and "bo: '4'" in result.sentence()
    assert waiting(run) == [a, b]
    assert status(run)["conflicts"][0]["said"] == [["ana", "5"], ["bo", "4"]]
    before = (run.path / "conflicts.json").read_bytes()
    import_labels(run, path, "nobody")
    assert (run.path / "conflicts.json").read_bytes() == before
    path = said(tmp_path / "q.csv", (a, "ana", "5"), (a, "bo", "4"), (a, "cy", "4"))
    assert import_labels(run, path, "nobody", cost=2).cost == 6.0
    assert status(run)["conflicts"] == []
    assert waiting(run) == [b]


def test_a_label_of_three_costs_what_three_were_paid_and_names_them(make_run, tmp_path):
    run = make_run(2)
    a, b = ids_of(run)
    rows = [(a, "ana", "4", 1.5), (a, "bo", "5", ""), (a, "cy", "4", 3), (b, "ana", "1", 0)]
    path = write_csv(tmp_path / "q.csv", rows, ("pt_id", "annotator", "label", "cost"))
    import_labels(run, path, "nobody", cost=2.0)
    first, second = run.ledger().entries()
    assert (first["label"], first["cost"], first["annotator"]) == ("4", 6.5, "ana, bo, cy")
    assert first["annotations"][1] == {"annotator": "bo", "label": "5", "cost": 2.0}
    assert (second["cost"], "annotations" in second) == (0.0, False)
    found = status(run)
    assert found["annotators"] == [
        {"annotator": "ana", "annotations": 2, "cost": 1.5},
        {"annotator": "bo", "annotations": 1, "cost": 2.0},
        {"annotator": "cy", "annotations": 1, "cost": 3.0},
    ]
    assert (found["cost"], found["several"], found["differed"]) == (6.5, 1, 1)


def test_answers_agree_by_meaning_not_by_spelling(make_run, tmp_path):
    run = make_run(1, kind="expression")
    (a,) = ids_of(run)
    rows = [(a, "ana", "1+2"), (a, "bo", "2+1"), (a, "cy", "5")]
    result = import_labels(run, said(tmp_path / "q.csv", *rows), "nobody")
    assert run.ledger().labels() == {a: "1+2"}
    assert result.agreement.agreement == pytest.approx(1 / 3)


def test_one_annotator_who_contradicts_themselves_is_a_bad_row(make_run, tmp_path):
    run = make_run(1)
    (a,) = ids_of(run)
    path = said(tmp_path / "q.csv", (a, "ana", "1"), (a, "ana", "2"), (a, "bo", "1"))
    with pytest.raises(PivotTraceError, match=r"two different labels \(first: line 3"):
        import_labels(run, path, "nobody")


def test_a_ledger_label_stands_and_the_conflict_is_kept_for_whoever_settles_it(make_run, tmp_path):
    run = make_run(1)
    (a,) = ids_of(run)
    import_labels(run, said(tmp_path / "1.csv", (a, "ana", "1")), "nobody")
    rows = [(a, "bo", "2"), (a, "cy", "2")]
    result = import_labels(run, said(tmp_path / "2.csv", *rows), "nobody")
    assert result.conflicts == [(a, "1", "2")]
    assert run.ledger().labels() == {a: "1"}
    (kept,) = status(run)["conflicts"]
    assert (kept["ledger"], kept["said"]) == ("1", [["bo", "2"], ["cy", "2"]])


def test_annotators_in_files_of_their_own_count_as_in_one_file(make_run, tmp_path):
    rows = [("ana", "5"), ("bo", "4"), ("dee", "6"), ("cy", "4")]
    together, apart = make_run(1, name="together"), make_run(1, name="apart")
    (a,) = ids_of(together)
    import_labels(together, said(tmp_path / "q.csv", *((a, *row) for row in rows)), "nobody")
    files = {"1.csv": (rows[:2], 2.0), "2.csv": (rows[2:3], 3.0), "3.csv": (rows[3:], 1.0)}
    for name, (some, cost) in files.items():
        path = said(tmp_path / name, *((a, *row) for row in some))
        result = import_labels(apart, path, "nobody", cost=cost)
        (dispute,) = result.disputes
        assert dispute.resolved == (None if name != "3.csv" else "4")
    assert dispute.said == rows
    assert apart.ledger().labels() == together.ledger().labels() == {a: "4"}
    (entry,) = apart.ledger().entries()
    assert (entry["annotator"], entry["cost"]) == ("ana, bo, dee, cy", 8.0)
    assert [part["cost"] for part in entry["annotations"]] == [2.0, 2.0, 3.0, 1.0]
    assert status(apart)["conflicts"] == []
    kept = (apart.path / "conflicts.json").read_bytes()
    for name in files:
        again = import_labels(apart, tmp_path / name, "nobody")
        assert (again.added, again.conflicts) == (0, [])
    assert status(apart)["conflicts"] == []
    assert set(json.loads(kept)[0]) == {"pt_id", "said", "costs", "ledger", "source_file"}


def test_of_one_annotator_the_last_word_on_an_open_prompt_counts(make_run, tmp_path):
    run = make_run(1)
    (a,) = ids_of(run)
    import_labels(run, said(tmp_path / "1.csv", (a, "ana", "5"), (a, "bo", "4")), "nobody")
    result = import_labels(run, said(tmp_path / "2.csv", (a, "ana", "4")), "nobody")
    assert (result.added, result.disputes) == (1, [])
    assert run.ledger().labels() == {a: "4"}


def test_who_differs_from_a_bought_label_is_listed_beside_who_gave_it(make_run, tmp_path):
    run = make_run(2)
    a, b = ids_of(run)
    import_labels(run, write_csv(tmp_path / "ana.csv", [(a, "1"), (b, "7")]), "ana")
    result = import_labels(run, write_csv(tmp_path / "bo.csv", [(a, "2"), (b, "7")]), "bo")
    (dispute,) = result.disputes
    assert (dispute.said, dispute.resolved) == ([("ana", "1"), ("bo", "2")], "1")
    assert (result.agreement.prompts, result.agreement.agreement) == (2, 0.5)
    assert run.ledger().labels() == {a: "1", b: "7"}
    again = import_labels(run, tmp_path / "ana.csv", "ana")
    assert (again.already, again.disputes) == (2, [])


@pytest.mark.parametrize(
    "changed",
    [{"said": [["ana"]]}, {"said": "ana"}, {"costs": []}, {"costs": [-1]}, {"costs": [True]},
     {"pt_id": 1}],
)  # fmt: skip
def test_a_broken_file_of_conflicts_stops_an_import_before_the_ledger_is_touched(
    make_run, tmp_path, changed
):
    run = make_run(1)
    good = {"said": [["ana", "1"]], "costs": [1.0], "ledger": None, "source_file": "f"}
    broken = [{"pt_id": ids_of(run)[0], **good, **changed}]
    (run.path / "conflicts.json").write_text(json.dumps(broken))
    with pytest.raises(PivotTraceError, match="not a list of conflicts"):
        import_labels(run, said(tmp_path / "q.csv", (ids_of(run)[0], "ana", "1")), "nobody")
    assert not run.ledger().path.exists()


def test_skips_are_counted_and_are_no_labels(make_run, tmp_path):
    run = make_run(3)
    a, b, c = ids_of(run)
    path = write_csv(tmp_path / "q.csv", [(a, "unsure"), (b, "Skipped"), (c, "")])
    result = import_labels(run, path, "ana")
    assert (result.added, result.skipped, result.empty) == (0, 2, 1)
    assert waiting(run) == [a, b, c]


# Bad rows


def test_good_rows_are_taken_and_bad_ones_written_with_reasons(make_run, tmp_path):
    run = make_run(4, kind="expression")
    a, b, c, d = ids_of(run)
    path = tmp_path / "q.csv"
    path.write_text(
        f"pt_id,label,cost\n{a},1+2,\nstranger,1,\n{b},one,\n{c},3,4,5\n{d},4,-1\n{a},9,\n"
    )
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(PivotTraceError, match="4 cells"):
        import_labels(run, path, "ana")
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    result = import_labels(run, path, "ana", skip_bad=True)
    assert run.ledger().labels() == {a: "1+2"}
    assert result.rejected == 5
    rejected = tmp_path / "q.csv.rejected.jsonl"
    assert result.rejected_file == str(rejected)
    lines = [json.loads(line) for line in rejected.read_text().splitlines()]
    assert {line["where"] for line in lines} == {f"line {n}" for n in (3, 4, 5, 6, 7)}
    by_line = {line["where"]: line for line in lines}
    assert "4 cells" in by_line["line 5"]["detail"]
    assert "cost '-1'" in by_line["line 6"]["detail"]
    assert by_line["line 3"]["row"]["pt_id"] == "stranger"
    assert "expression" in by_line["line 4"]["reason"]
    assert by_line["line 7"]["detail"] == "'9' after '1+2' of the same annotator"


def test_a_file_that_is_bad_as_a_whole_is_refused_even_then(make_run, tmp_path):
    run = make_run(1)
    path = write_csv(tmp_path / "q.csv", [], ("id", "label"))
    with pytest.raises(PivotTraceError, match="no column pt_id"):
        import_labels(run, path, "ana", skip_bad=True)
    assert not run.ledger().path.exists()


# Checks


def test_a_sample_is_drawn_by_seed_and_refuses_where_one_of_it_fails(make_run, tmp_path):
    run = make_run(200, kind="expression", plan=False)
    rows = [(i, f"{k}+" if k < 100 else k) for k, i in enumerate(ids_of(run))]
    path = write_csv(tmp_path / "q.csv", rows)
    with pytest.raises(PivotTraceError, match=r"of 20 labels .* so about \d+ of"):
        import_labels(run, path, "ana", check="sample:20")
    assert not run.ledger().path.exists()
    result = import_labels(run, path, "ana", check="sample:20", skip_bad=True)
    assert result.check.checked == 20
    assert result.rejected == result.check.failed > 0
    assert result.added == 200 - result.rejected
    assert 40 < result.check.estimate() < 160
    labels = [str(k) for k in range(100)]
    assert to_check("sample:9", labels, 1) == to_check("sample:9", labels, 1)
    assert to_check("sample:9", labels, 1) != to_check("sample:9", labels, 2)
    assert len(to_check("sample:900", labels)) == 100


def test_unchecked_labels_are_taken_as_they_are(make_run, tmp_path):
    run = make_run(2, kind="expression")
    path = write_csv(tmp_path / "q.csv", [(i, "no sum") for i in ids_of(run)])
    result = import_labels(run, path, "ana", check="none")
    assert (result.added, result.check.checked) == (2, 0)
    assert "0 of 1 different labels were checked" in result.sentence()


@pytest.mark.parametrize("mode", ["some", "sample:", "sample:0", "sample:-1", "sample:x", ""])
def test_an_unknown_check_or_rule_is_refused(make_run, tmp_path, mode):
    run = make_run(1)
    path = write_csv(tmp_path / "q.csv", [(ids_of(run)[0], "1")])
    with pytest.raises(PivotTraceError, match="must be all, sample:N or none"):
        import_labels(run, path, "ana", check=mode)
    with pytest.raises(PivotTraceError, match="must be one of majority, first, unanimous"):
        import_labels(run, path, "ana", rule=mode)
    assert not run.ledger().path.exists()


def test_mathematics_is_checked_by_the_kinds_own_workers():
    labels = ["1/2", "\\frac{1}{2}", "", "no number {", "[[", "12"]
    assert check_labels("math", labels) == [True, True, False, False, False, True]


def test_a_kind_of_ones_own_that_breaks_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "own_kind.py").write_text(
        "class Own:\n"
        "    def extract(self, text): return text\n"
        "    def equal(self, a, b): return a == b\n"
        "    def canonical(self, label): raise RuntimeError('out of order')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PivotTraceError, match="RuntimeError: out of order"):
        check_labels("own_kind:Own", ["1"])


# Rounds and budget


def test_each_re_triage_asks_only_for_what_has_no_label_and_opens_a_round(make_run, tmp_path):
    run = make_run(5)
    ids = ids_of(run)
    path = tmp_path / "q.csv"
    (run.path / "plan.parquet").unlink()
    (run.path / "triage.json").unlink()
    run.write_probes("entropy", 0, ids[:1])
    import_labels(run, write_csv(tmp_path / "p.csv", [(ids[0], "1")]), "ana")
    write_plan(run, ids[:3])
    assert waiting(run) == ids[1:3]
    assert export_queue(run, waiting(run), path) == 2
    import_labels(run, write_csv(path, [(ids[1], "1")]), "ana")
    import_labels(run, write_csv(path, [(ids[1], "1"), (ids[2], "1")]), "bo")
    write_plan(run, ids[2:], reason="again")
    write_plan(run, ids[2:], reason="and again, before anything was bought")
    assert waiting(run) == ids[3:]
    assert import_labels(run, write_csv(path, [(ids[3], "1")]), "bo").round == 2
    rounds = {entry["pt_id"]: entry["round"] for entry in run.ledger().entries()}
    assert rounds == {ids[0]: 1, ids[1]: 1, ids[2]: 1, ids[3]: 2}
    found = status(run)
    assert found["rounds"] == [
        {"round": 1, "labels": 3, "probes": 1, "cost": 3.0},
        {"round": 2, "labels": 1, "probes": 0, "cost": 1.0},
    ]
    assert found["open"] == {"probes": 0, "queue": 1}


@pytest.mark.parametrize(
    ("budget", "said"), [({"budget": 2}, "1 more than"), ({"budget_cost": 2.5}, "budget is 2.5")]
)
def test_labels_beyond_the_budget_are_taken_and_told(make_run, tmp_path, budget, said):
    run = make_run(3)
    ids = ids_of(run)
    write_plan(run, ids, {"labels": budget})
    two = import_labels(run, write_csv(tmp_path / "1.csv", [(i, "1") for i in ids[:2]]), "ana")
    assert two.over_budget is None
    three = import_labels(run, write_csv(tmp_path / "2.csv", [(i, "1") for i in ids]), "ana")
    assert said in three.over_budget and said in three.sentence()
    assert len(run.ledger().labels()) == 3


def test_status_before_anything_was_done(make_run):
    found = status(make_run(2, plan=False))
    assert (found["bought"], found["rounds"], found["annotators"]) == (0, [], [])
    assert found["open"] == {"probes": None, "queue": None}


# Speed


def test_a_large_import_is_linear_and_reads_the_ledger_once(make_run, tmp_path, monkeypatch):
    from pivottrace_verl.ledger import Ledger

    run = make_run(20_000, plan=False)
    ids = ids_of(run)
    import_labels(run, write_csv(tmp_path / "1.csv", [(i, "x") for i in ids[:10_000]]), "ana")
    reads = []
    parse = Ledger._parse
    monkeypatch.setattr(Ledger, "_parse", lambda *args: reads.append(1) or parse(*args))
    start = time.perf_counter()
    path = write_csv(tmp_path / "2.csv", [(i, "x") for i in ids])
    assert import_labels(run, path, "ana", check="none").added == 10_000
    # Once before the append and once after it, to tell the budget.
    assert len(reads) <= 2
    assert time.perf_counter() - start < 10
