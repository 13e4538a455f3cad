"""Bad label files and queues: what the `annotate` verbs are given."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

from bad_pools import PICKLE
from bad_world import Case, ids

from pivottrace_verl.pool import RunDir


def waiting(w: Path) -> list[str]:
    """Prompts without a label."""
    bought = RunDir.open(w / "run").ledger().labels()
    return [pt_id for pt_id in ids(w) if pt_id not in bought]


def a_file(file: str, content: str | bytes) -> Callable[[Path], object]:
    """`<a>`, `<b>`, `<c>` stand for prompts that wait for a label, `<old>` for one that has it."""

    def arrange(w: Path) -> None:
        made = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        for name, pt_id in zip(("<a>", "<b>", "<c>"), waiting(w), strict=False):
            made = made.replace(name.encode(), pt_id.encode())
        (w / file).write_bytes(made)

    return arrange


def imported(name: str, file: str, content: str | bytes, says: str) -> Case:
    return Case(name, f"annotate import {{w}}/run {{w}}/{file}", says, a_file(file, content))


def csv(name: str, content: str | bytes, says: str) -> Case:
    return imported(name, "bad.csv", content, says)


def lines(name: str, content: str | bytes, says: str) -> Case:
    return imported(name, "bad.jsonl", content, says)


LABELS = [
    csv("labels: empty file", "", r"bad\.csv has no column pt_id, label; its columns are none"),
    csv("labels: wrong columns", "id,answer\n<a>,1\n", "no column pt_id, label; .* id, answer"),
    csv("labels: a column missing", "pt_id,answer\n<a>,1\n", "no column label"),
    csv("labels: a column twice", "pt_id,label,label\n<a>,1,2\n", r"bad\.csv .*label.* twice"),
    csv("labels: other separator", "pt_id;label\n<a>;1\n", "no column .* pt_id;label"),
    csv("labels: too many cells", "pt_id,label\n<a>,1,2\n", "Line 2 of .* 3 cells, .* has 2"),
    csv("labels: too few cells", "pt_id,label\n<a>\n", "Line 2 of .* 1 cells, .* has 2"),
    csv("labels: quote left open", 'pt_id,label\n<a>,"1\n<b>,2\n', r"bad\.csv is not a readable"),
    csv("labels: text behind a quote", 'pt_id,label\n<a>,"1"2\n', "readable CSV file: line 2"),
    csv("labels: broken UTF-8", b"pt_id,label\n\xff\xfe,1\n", r"bad\.csv is not UTF-8"),
    csv("labels: UTF-16", "pt_id,label\n<a>,1\n".encode("utf-16"), r"bad\.csv is not UTF-8"),
    csv("labels: NUL bytes", b"\0" * 512, r"bad\.csv has no column pt_id, label"),
    csv("labels: a prompt of another pool", "pt_id,label\n<a>,1\nstranger,1\n",
        r"1 rows name prompts that are not in this pool \(first: line 3: 'stranger'\)"),
    csv("labels: id missing", "pt_id,label\n,1\n", r"line 2: ''"),
    csv("labels: huge id", f"pt_id,label\n{'x' * 100_000},1\n", "1 rows name prompts .* line 2"),
    csv("labels: id with a line break", 'pt_id,label\n"a\nb",1\n', "1 rows name prompts .* line 2"),
    csv("labels: id that drives a terminal", "pt_id,label\n\x1b[2J,1\n", "1 rows name prompts"),
    csv("labels: do not parse", "pt_id,label\n<a>,1\n<b>,two\n<c>,2+\n",
        "2 labels cannot be read as expression answers .* line 3: 'two'"),
    csv("labels: a formula that is no answer", "pt_id,label\n<a>,=SUM(A1:A9)\n", "1 labels cannot"),
    csv("labels: two for a prompt", "pt_id,label\n<a>,1\n<a>,2\n",
        "1 prompts have two different labels .* line 3: '2' after '1'"),
    csv("labels: several faults", "pt_id,label\n<a>,1\nx,1\n<b>,?\n",
        "1 rows name prompts .*; 1 labels cannot"),
    lines("labels: torn line", '{"pt_id": "<a>", "label": "1"}\n{"pt_', "Line 2 of .* not JSON"),
    lines("labels: line without a label", '{"pt_id": "<a>"}\n', "Line 1 of .* has no label"),
    lines("labels: line that is a list", "[]\n", r"Line 1 of .*bad\.jsonl"),
    lines("labels: id that is a list", '{"pt_id": ["<a>"], "label": "1"}\n', "not text"),
    lines("labels: id that is null", '{"pt_id": null, "label": "1"}\n', "not text"),
    lines("labels: a truth value", '{"pt_id": "<a>", "label": true}\n', "1 labels cannot"),
    lines("labels: an object", '{"pt_id": "<a>", "label": {"a": 1}}\n', "1 labels cannot"),
    lines("labels: NaN", '{"pt_id": "<a>", "label": NaN}\n', "1 labels cannot .*nan"),
    lines("labels: infinity", '{"pt_id": "<a>", "label": 1e999}\n', "1 labels cannot .*inf"),
    lines("labels: half a surrogate pair", '{"pt_id": "<a>", "label": "\\ud800"}\n', "1 labels"),
    lines("labels: id half a surrogate pair", '{"pt_id": "\\ud800", "label": "1"}\n', "1 rows"),
    lines("labels: nested too deep", "[" * 100_000, "Line 1 of .* not JSON"),
    lines("labels: number without end", '{"pt_id": "<a>", "label": 1%s}' % ("0" * 100_000),
          r"Line 1 of .*bad\.jsonl .*digits"),
    imported("labels: unknown suffix", "bad.txt", "", r"bad\.txt is neither a .jsonl nor a .csv"),
    imported("labels: a pickle", "bad.pkl", PICKLE, r"bad\.pkl is neither"),
    csv("labels: a pickle called CSV", PICKLE, r"bad\.csv"),
    lines("labels: a pickle called JSONL", pickle.dumps({"pt_id": "a"}, 0), r"Line 1 of .*bad"),
    Case("labels: no such file", "annotate import {w}/run {w}/none.csv",
         "none.csv .* no such file"),
    Case("labels: a folder", "annotate import {w}/run {w}/d.csv", r"d\.csv .*: is a directory",
         lambda w: (w / "d.csv").mkdir()),
    Case("labels: unknown purpose", "annotate import {w}/run {w}/filled.csv --purpose fun",
         "'fun'"),
    *(
        Case(f"labels: cost {cost}", f"annotate import {{w}}/run {{w}}/filled.csv --cost {cost}",
             f"cost.* is {cost}")
        for cost in ("-1.0", "nan", "inf")
    ),
    Case("labels: cost is a word", "annotate import {w}/run {w}/filled.csv --cost much", "--cost"),
]  # fmt: skip


def half_filled(w: Path) -> None:
    a_file("queue.csv", "pt_id,label\n<a>,1\n<b>,\n")(w)


QUEUES = [
    Case("queue: unknown sort", "annotate export {w}/run {w}/q.csv --what all", "not 'all'"),
    Case("queue: unknown suffix", "annotate export {w}/run {w}/q.docx", r"q\.docx is neither"),
    Case("queue: work would be lost", "annotate export {w}/run {w}/queue.csv",
         r"queue\.csv already holds 1 labels that are not imported", half_filled),
    Case("queue: over a file that is no queue", "annotate export {w}/run {w}/notes.csv",
         r"notes\.csv has no column pt_id, label", lambda w: (w / "notes.csv").write_text("a,b\n")),
    Case("queue: into a folder's place", "annotate export {w}/run {w}/d.csv", r"d\.csv .*directory",
         lambda w: (w / "d.csv").mkdir()),
    Case("queue: below a file", "annotate export {w}/run {w}/pool.jsonl/q.csv",
         r"pool\.jsonl/q\.csv cannot be written: .*"),
    Case("queue: a path too long", "annotate export {w}/run {w}/%s.csv" % ("x" * 300),
         r"xxx\.csv.*: file name too long"),
    Case("fill: answers missing", "annotate fill {w}/queue.csv {w}/out.csv --answers {w}/a.csv",
         r"a\.csv has no answer for \d+ prompts of .*queue\.csv",
         lambda w: (w / "a.csv").write_text("pt_id,label\n")),
    Case("fill: queue without ids", "annotate fill {w}/q.csv {w}/out.csv --answers {w}/labels.csv",
         r"q\.csv has no column pt_id", lambda w: (w / "q.csv").write_text("label\n1\n")),
    Case("fill: answers are a pickle", "annotate fill {w}/queue.csv {w}/o.csv --answers {w}/a.pkl",
         r"a\.pkl is neither", lambda w: (w / "a.pkl").write_bytes(PICKLE)),
]  # fmt: skip

GOOD_ENTRY = {
    "pt_id": "<a>",
    "label": "1",
    "annotator": "ana",
    "time": "2026-01-01T00:00:00+00:00",
    "source_file": "f",
    "cost": 1.0,
    "purpose": "annotate",
}


def ledger_line(**changed: object) -> str:
    return json.dumps({**GOOD_ENTRY, **changed})


def without(field: str) -> str:
    return json.dumps({name: value for name, value in GOOD_ENTRY.items() if name != field})


def ledger(name: str, line: str | bytes, says: str, command: str = "triage {w}/run") -> Case:
    """The line stands at the end of a ledger that is good otherwise."""

    def arrange(w: Path) -> None:
        before = (w / "run" / "ledger.jsonl").read_bytes()
        a_file("run/ledger.jsonl", line)(w)
        added = (w / "run" / "ledger.jsonl").read_bytes()
        (w / "run" / "ledger.jsonl").write_bytes(before + added + b"\n")

    return Case(f"ledger: {name}", command, says, arrange)


LEDGERS = [
    ledger("foreign JSON", '{"event": "start"}', r"Line 21 of .*ledger\.jsonl is not .* pt_id"),
    ledger("a list", "[1, 2]", r"Line 21 of .*ledger\.jsonl is not a ledger entry"),
    *(
        ledger(f"no {field}", without(field), rf"Line 21 of .*ledger\.jsonl .* no {field}")
        for field in GOOD_ENTRY
    ),
    ledger("id a number", ledger_line(pt_id=7), r"Line 21 of .*ledger\.jsonl .* pt_id"),
    ledger("label null", ledger_line(label=None), r"Line 21 of .*ledger\.jsonl .* label"),
    ledger("label a list", ledger_line(label=["1"]), r"Line 21 of .*ledger\.jsonl .* label"),
    ledger("cost negative", ledger_line(cost=-1), r"Line 21 of .*ledger\.jsonl .* cost"),
    ledger("cost NaN", ledger_line(cost=float("nan")), r"Line 21 of .*ledger\.jsonl .* cost"),
    ledger("cost a word", ledger_line(cost="1"), r"Line 21 of .*ledger\.jsonl .* cost"),
    ledger("purpose unknown", ledger_line(purpose="fun"), r"Line 21 of .*ledger\.jsonl .* purpose"),
    ledger("unknown prompt", ledger_line(pt_id="stranger"), "ledger.jsonl .*'?stranger"),
    ledger("binary garbage", bytes(range(128, 256)), r"Line 21 of .*ledger\.jsonl is not"),
    ledger("nested too deep", "[" * 100_000, r"Line 21 of .*ledger\.jsonl is not"),
    ledger("foreign JSON, import", '{"event": 1}', "Line 21 .*ledger",
           "annotate import {w}/run {w}/filled.csv"),
    ledger("cost NaN, report", ledger_line(cost=float("nan")), "Line 21 .*cost",
           "report {w}/run"),
    Case("ledger: a folder", "triage {w}/run", r"ledger\.jsonl cannot be read: is a directory",
         lambda w: ((w / "run/ledger.jsonl").unlink(), (w / "run/ledger.jsonl").mkdir())),
]  # fmt: skip

CASES = [*LABELS, *QUEUES, *LEDGERS]
