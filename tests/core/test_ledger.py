"""The ledger keeps every label that was bought, whatever happens to the process."""

import resource
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.ledger import Ledger, TornLedgerWarning


def make_entry(pt_id, label="1", **changed):
    entry = {"pt_id": pt_id, "label": label, "annotator": "ana", "source_file": "f.csv"}
    return {**entry, "purpose": "probe", **changed}


def test_labels_purposes_and_costs_come_back(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert ledger.labels() == {}
    assert ledger.spent() == 0.0
    ledger.append([make_entry("a", "1", cost=0.5), make_entry("b", "=é\n2", purpose="annotate")])
    ledger.append([make_entry("c")])
    assert Ledger(ledger.path).labels() == {"a": "1", "b": "=é\n2", "c": "1"}
    assert ledger.labels("annotate") == {"b": "=é\n2"}
    assert ledger.purposes() == {"a": "probe", "b": "annotate", "c": "probe"}
    assert ledger.spent() == 2.5
    assert all(e["time"].endswith("+00:00") for e in ledger.entries())


def test_an_append_leaves_what_was_there_byte_for_byte(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append([make_entry("a")])
    before = ledger.path.read_bytes()
    ledger.append([make_entry("b")])
    assert ledger.path.read_bytes().startswith(before)
    ledger.append([])
    assert ledger.path.read_bytes().count(b"\n") == 2


def test_the_fingerprint_follows_labels_not_times_or_batches(tmp_path):
    one, two = Ledger(tmp_path / "1"), Ledger(tmp_path / "2")
    one.append([make_entry("a"), make_entry("b")])
    two.append([make_entry("b", time="then", annotator="bo")])
    assert one.fingerprint() != two.fingerprint()
    two.append([make_entry("a")])
    assert one.fingerprint() == two.fingerprint()


def test_a_torn_line_is_reported_not_counted_and_never_destroyed(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append([make_entry("a"), make_entry("b")])
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole[:-25])
    torn = whole[:-25].split(b"\n")[-1]
    with pytest.warns(TornLedgerWarning, match="line 2"):
        assert ledger.labels() == {"a": "1"}
    assert ledger.torn == [2]
    with pytest.warns(TornLedgerWarning):
        ledger.append([make_entry("b", "2"), make_entry("c")])
    assert ledger.path.read_bytes().split(b"\n")[1] == torn
    with pytest.warns(TornLedgerWarning):
        assert ledger.labels() == {"a": "1", "b": "2", "c": "1"}


def test_a_last_line_that_only_lacks_its_newline_counts(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append([make_entry("a")])
    ledger.path.write_bytes(ledger.path.read_bytes().rstrip(b"\n"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ledger.append([make_entry("b")])
        assert ledger.labels() == {"a": "1", "b": "1"}


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ([make_entry("a", "2")], "'1' already"),
        ([make_entry("b"), make_entry("b", "3")], "'1' already"),
        ([make_entry("b", purpose="fun")], "fun"),
        ([{"pt_id": "b", "label": "1"}], "annotator"),
        ([make_entry("b", mood="good")], "mood"),
    ],
)
def test_a_bad_batch_is_refused_whole(tmp_path, batch, said):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append([make_entry("a")])
    before = ledger.path.read_bytes()
    with pytest.raises(PivotTraceError, match=said):
        ledger.append([make_entry("x"), *batch])
    assert ledger.path.read_bytes() == before


def test_of_two_labels_that_got_in_by_hand_the_first_stands(tmp_path):
    one, two = Ledger(tmp_path / "1"), Ledger(tmp_path / "2")
    one.append([make_entry("a", "first")])
    two.append([make_entry("a", "second", purpose="annotate")])
    with open(one.path, "ab") as file:
        file.write(two.path.read_bytes())
    assert one.labels() == {"a": "first"}
    assert one.purposes() == {"a": "probe"}
    assert one.spent() == 2.0


def test_a_line_that_is_json_but_no_entry_is_refused(tmp_path):
    (tmp_path / "ledger.jsonl").write_text('{"pt_id": "a"}\n')
    with pytest.raises(PivotTraceError, match="Line 1"):
        Ledger(tmp_path / "ledger.jsonl").labels()


def test_a_batch_that_does_not_fit_on_the_disk_leaves_the_ledger_as_it_was(tmp_path):
    """A real short write: the file may not grow past a limit in the middle of the batch."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append([make_entry("a")])
    before = ledger.path.read_bytes()
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from pivottrace_verl.errors import PivotTraceError\n"
        "from pivottrace_verl.ledger import Ledger\n"
        "entry = dict(label='1', annotator='ana', source_file='f', purpose='probe')\n"
        "batch = [dict(entry, pt_id=str(i)) for i in range(50)]\n"
        "try: Ledger(Path(sys.argv[1])).append(batch)\n"
        "except PivotTraceError as error: print(error)\n"
    )

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 333, len(before) + 333))

    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code, str(ledger.path)],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=limit,
        env={"PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert "no label was added" in done.stdout, done.stderr
    assert ledger.path.read_bytes() == before


def test_lines_from_before_rounds_are_of_round_one_and_new_ones_carry_their_plan(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.path.write_text(
        '{"pt_id": "old", "label": "1", "annotator": "ana", "time": "then", "source_file": "f", '
        '"cost": 1.0, "purpose": "probe"}\n'
    )
    assert ledger.labels() == {"old": "1"}
    assert [ledger.round_of(plan) for plan in (None, "p1")] == [1, 1]
    ledger.append([make_entry("a", round=ledger.round_of("p1"), plan="p1")])
    assert [ledger.round_of(plan) for plan in (None, "p1", "p2")] == [1, 1, 2]
    ledger.append([make_entry("b", round=2, plan="p2"), make_entry("c", plan=None)])
    assert [ledger.round_of(plan) for plan in (None, "p1", "p2", "p3")] == [2, 1, 2, 3]
    assert [entry.get("round", 1) for entry in Ledger(ledger.path).entries()] == [1, 1, 2, 1]


@pytest.mark.parametrize(
    "changed",
    [{"round": 0}, {"round": "1"}, {"plan": 3}, {"annotations": 1}, {"annotations": [{}]}],
)
def test_a_line_whose_round_plan_or_annotations_are_odd_is_refused(tmp_path, changed):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(PivotTraceError, match=f"its {next(iter(changed))}"):
        ledger.append([make_entry("a", **changed)])
    assert not ledger.path.exists()


def test_what_another_process_appended_is_seen_by_a_ledger_that_was_read_before(tmp_path):
    one, two = Ledger(tmp_path / "ledger.jsonl"), Ledger(tmp_path / "ledger.jsonl")
    assert one.labels() == two.labels() == {}
    one.append([make_entry("a")])
    assert two.labels() == {"a": "1"}
    two.append([make_entry("b")])
    with pytest.raises(PivotTraceError, match="already"):
        one.append([make_entry("b", "2")])
    assert one.labels() == {"a": "1", "b": "1"}
