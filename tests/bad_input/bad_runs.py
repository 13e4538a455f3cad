"""Run directories that do not fit together, and settings out of their range."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from bad_labels import a_file
from bad_pools import PICKLE, not_text
from bad_world import CHAT, Case, good, ids, jsonl, scored
from safetensors.numpy import save

from pivottrace_verl.pivots import FEATURES
from pivottrace_verl.pool import RunDir


def edited(file: str, change: Callable[[Any], Any]) -> Callable[[Path], object]:
    """A JSON file of the run, changed."""

    def arrange(w: Path) -> None:
        content = json.loads((w / "run" / file).read_text())
        (w / "run" / file).write_text(json.dumps(change(content)))

    return arrange


def table(file: str, change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], object]:
    """A table of the run, changed, its note of what it was made from kept."""

    def arrange(w: Path) -> None:
        path = w / "run" / file
        before = pq.read_table(path, partitioning=None)
        after = change(before).replace_schema_metadata(before.schema.metadata)
        pq.write_table(after, path)

    return arrange


def torn(file: str) -> Callable[[Path], object]:
    def arrange(w: Path) -> None:
        content = (w / "run" / file).read_bytes()
        (w / "run" / file).write_bytes(content[: len(content) // 2])

    return arrange


def replaced(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda w: (w / "run" / file).write_bytes(content)


def not_scored_with(choice: bytes) -> Callable[[Path], object]:
    """The run without its scores, and with this as the heads that were chosen for it."""

    def arrange(w: Path) -> None:
        shutil.rmtree(w / "run" / "scores")
        (w / "run" / "capture.json").write_bytes(choice)

    return arrange


def set_column(name: str, values: pa.Array) -> Callable[[pa.Table], pa.Table]:
    return lambda t: t.set_column(t.schema.get_field_index(name), name, values)


def scores_again(w: Path) -> None:
    """The same prompts, scored anew with other outcomes."""
    run = RunDir.open(w / "run")
    rows = [scored(prompt.pt_id, 39 - i) for i, prompt in enumerate(run.pool())]
    for part, start in enumerate(range(0, 40, 16)):
        run.write_score_part(part, rows[start : start + 16])
    run.merge_scores()


def foreign_part(w: Path) -> None:
    run = RunDir.open(w / "run")
    run.write_score_part(3, [scored("0123456789abcdef", 3)])


def repeated_part(w: Path) -> None:
    run = RunDir.open(w / "run")
    run.write_score_part(3, [scored(run.pool()[0].pt_id, 3)])


def part_of_another_run(w: Path) -> None:
    other = jsonl(w / "other.jsonl", [{"prompt": CHAT}])
    made = RunDir.create(w / "other", other, w / "model")
    made.write_score_part(0, [scored(made.pool()[0].pt_id, 0)])
    part = (w / "other" / "scores" / "part-00000.parquet").read_bytes()
    (w / "run" / "scores" / "part-00001.parquet").write_bytes(part)


def another_pool(w: Path) -> None:
    jsonl(w / "pool.jsonl", [{"prompt": CHAT, "data_source": "other"}])


def another_model(w: Path) -> None:
    (w / "model" / "model.safetensors").write_bytes(b"trained further")


def traces(beside: Any, tensors: bytes | None = None) -> Callable[[Path], object]:
    """Kept traces: the JSON of their tokens, and the tensors, of one token unless given."""

    def arrange(w: Path) -> None:
        pt_id = RunDir.open(w / "run").pool()[0].pt_id
        (w / "run" / "traces").mkdir()
        part = w / "run" / "traces" / "part-00000"
        text = beside if isinstance(beside, str) else json.dumps(beside)
        part.with_suffix(".json").write_text(text.replace("<a>", pt_id))
        whole = save({f"{pt_id}/0": np.zeros((1, 1, 1, len(FEATURES)), np.float32)})
        part.with_suffix(".safetensors").write_bytes(whole if tensors is None else tensors)

    return arrange


TOKENS = {"<a>/0": {"tokens": ["a"], "seed": 1, "answer": "1"}}
SCORE = "score {w}/run --part-size 16"

MANIFESTS = [
    Case("no run directory", "score {w}/nothing", "nothing is not a run directory"),
    Case("run directory is a file, probe", "probe {w}/pool.jsonl",
         r"pool\.jsonl is not a run directory"),
    Case("run directory, links in a circle", "triage {w}/loop", "loop is not a run directory",
         lambda w: (w / "loop").symlink_to("loop")),
    Case("run directory, path too long", "report {w}/" + "x" * 300,
         "x/manifest.json cannot be used: file name too long"),
    Case("manifest torn", "triage {w}/run", r"manifest\.json is not .*JSON", torn("manifest.json")),
    Case("manifest binary", "report {w}/run", r"manifest\.json is not .*JSON",
         replaced("manifest.json", bytes(range(256)))),
    Case("manifest nested too deep", "report {w}/run", r"manifest\.json is not .*JSON",
         replaced("manifest.json", b"[" * 100_000)),
    Case("manifest a list", "probe {w}/run", r"manifest\.json does not hold one JSON object",
         replaced("manifest.json", b"[]")),
    Case("manifest of a later format", "probe {w}/run", "has format 7, .* reads format 1",
         edited("manifest.json", lambda m: {**m, "format": 7})),
    Case("manifest without a pool", "triage {w}/run", r"manifest\.json .*no pool",
         edited("manifest.json", lambda m: {k: v for k, v in m.items() if k != "pool"})),
    Case("manifest, pool a number", "report {w}/run", r"manifest\.json .*pool",
         edited("manifest.json", lambda m: {**m, "pool": 3})),
    Case("manifest without a model", "probe {w}/run", r"manifest\.json .*no model",
         edited("manifest.json", lambda m: {k: v for k, v in m.items() if k != "model"})),
    Case("manifest without answers", "triage {w}/run", r"manifest\.json .*no answers",
         edited("manifest.json", lambda m: {k: v for k, v in m.items() if k != "answers"})),
]  # fmt: skip

ANOTHER_MODEL = r"model .*\(\w{16}\), but that folder now holds \w{16}"
INIT_AGAIN = "init {w}/run --pool {w}/pool.jsonl --model {w}/model --answers expression"

CHANGED = [
    Case("init: another pool", INIT_AGAIN, r"another pool: .*pool\.jsonl \(\w{16}\) there",
         another_pool),
    Case("init: another model", INIT_AGAIN, r"another model: .*model \(\w{16}\) there",
         another_model),
    Case("init: another answers kind", INIT_AGAIN.replace("expression", "math"),
         "another answers kind: expression there, math here"),
    Case("init: another validation file", INIT_AGAIN + " --val {w}/v.jsonl",
         "other validation data: .* there, ",
         lambda w: jsonl(w / "v.jsonl", [{"prompt": CHAT, "label": "3"}])),
    Case("pool.parquet of another pool", "annotate export {w}/run {w}/q.csv --what probes",
         r"pool\.parquet in .* from pool \w{16}, but the run now has pool 0{16}",
         edited("manifest.json", lambda m: {**m, "pool": {**m["pool"], "fingerprint": "0" * 16}})),
    Case("pool.parquet with a prompt less", "annotate export {w}/run {w}/q.csv",
         r"pool\.parquet in .*run .* (\w{16}).* (\w{16})",
         table("pool.parquet", lambda t: t.slice(1))),
    Case("pool.parquet torn", "annotate export {w}/run {w}/q.csv", r"pool\.parquet .*Parquet",
         torn("pool.parquet")),
    Case("pool.parquet of others", "annotate export {w}/run {w}/q.csv", r"pool\.parquet in .*pool",
         lambda w: pq.write_table(pa.table({"prompt": ["q"]}), w / "run" / "pool.parquet")),
    Case("pool.parquet gone", "annotate export {w}/run {w}/q.csv", "pool.parquet.* no such file",
         lambda w: (w / "run" / "pool.parquet").unlink()),
    Case("pool.parquet, broken UTF-8", "annotate export {w}/run {w}/q.csv",
         r"pool\.parquet .* not UTF-8",
         table("pool.parquet", set_column("prompt", pa.concat_arrays([not_text()] * 40)))),
    Case("score: the model has changed", SCORE, ANOTHER_MODEL, another_model),
    Case("score: the model is gone", SCORE, "model.* no such file",
         lambda w: (w / "model" / "config.json").unlink()),
    Case("train: the model has changed", "train {w}/run", ANOTHER_MODEL, another_model),
    Case("evaluate: the model changed", "evaluate {w}/run before", ANOTHER_MODEL, another_model),
    Case("score: an engine option without a value", SCORE + " --engine tensor_parallel_size",
         "takes NAME=VALUE, not 'tensor_parallel_size'"),
    Case("score: an engine option that is not the user's", SCORE + " --engine model=x",
         "cannot set model: the model is the one that `pivottrace init` was given"),
    Case("score: other settings", SCORE + " --rollouts 4",
         "other settings .*score.rollouts: 8 on disk, 4 asked for"),
    Case("score: a torn part", SCORE, r"part-00001\.parquet .*Parquet",
         torn("scores/part-00001.parquet")),
    Case("score: a prompt twice", SCORE, r"Prompt \w{16} is scored twice, .*part-00003",
         repeated_part),
    Case("score: a foreign prompt", SCORE, "1 scored prompts are not in the pool", foreign_part),
    Case("score: a part of another run", SCORE, r"part-00001\.parquet in .* from pool \w{16}, but",
         part_of_another_run),
    Case("score: a part of an older version", SCORE, r"part-00001\.parquet .*lacks.* majority",
         table("scores/part-00001.parquet", lambda t: t.drop_columns(["majority"]))),
    Case("score: a part of a strange name", SCORE, r"part-old\.parquet",
         lambda w: (w / "run/scores/part-old.parquet").write_bytes(b"")),
    Case("score: heads of another model", SCORE,
         r"capture\.json were chosen for model 0, but the run has model \w{16}",
         replaced("capture.json", b'{"made_from": {"model": "0"}}')),
    Case("score: chosen heads torn", SCORE, r"capture\.json is not .*JSON",
         replaced("capture.json", b'{"made_from"')),
    Case("doctor: no run", "doctor {w}/model", "model is not a run directory"),
    Case("doctor: a run and a model", "doctor {w}/run --model {w}/model", "leave --model out"),
    Case("doctor: scores of unknown settings", "doctor {w}/run",
         r"manifest\.json does not say what the scores",
         edited("manifest.json", lambda m: {**m, "settings": {"score": []}})),
    Case("doctor: a capture that cannot be", "doctor {w}/run", "capture.window must be in 1 to",
         edited("manifest.json",
                lambda m: {**m, "settings": {"score": {"capture": {"window": 0}}}})),
    Case("doctor: chosen heads torn", "doctor {w}/run", r"capture\.json is not .*JSON",
         not_scored_with(b'{"made_from"')),
    Case("calibrate: scored already", "calibrate {w}/run", "scored already, .*choose heads before"),
    Case("calibrate: share of heads", "calibrate {w}/run --share 2", "share of heads .* not 2"),
    Case("calibrate: sink a NaN", "calibrate {w}/run --max-sink nan", "--max-sink is nan"),
    Case("scores of an older version", "triage {w}/run", r"scores\.parquet .*lacks.* answers",
         table("scores.parquet", lambda t: t.drop_columns(["answers"]))),
    Case("scores, a column of another type", "probe {w}/run", r"scores\.parquet .*length_mean",
         table("scores.parquet", set_column("length_mean", pa.array(["long"] * 40)))),
    Case("scores with a prompt less", "probe {w}/run", "scores.parquet in .* the run's prompts",
         table("scores.parquet", lambda t: t.slice(1))),
    Case("plan in another order", "train {w}/run", "plan.parquet in .* the run's prompts",
         table("plan.parquet", lambda t: t.sort_by("pt_id"))),
    Case("scores torn", "triage {w}/run", r"scores\.parquet .*Parquet", torn("scores.parquet")),
    Case("scores gone", "probe {w}/run", r"no scores\.parquet yet: run `pivottrace score` first",
         lambda w: (w / "run/scores.parquet").unlink()),
    Case("probes of other scores", "triage {w}/run",
         r"probes\.json in .* scores \w{16}, but the scores are now \w{16}", scores_again),
    Case("plan of other scores", "annotate export {w}/run {w}/q.csv",
         r"plan\.parquet in .* scores \w{16}, but the run now has scores \w{16}", scores_again),
    Case("report of other scores", "report {w}/run", r"scores \w{16}", scores_again),
    Case("probes torn", "triage {w}/run", r"probes\.json is not .*JSON", torn("probes.json")),
    Case("probes a list", "triage {w}/run", "probes.json does not hold", replaced("probes.json",
         b"[]")),
    Case("probes without ids", "triage {w}/run", r"probes\.json .*pt_ids",
         edited("probes.json", lambda p: {k: v for k, v in p.items() if k != "pt_ids"})),
    Case("probes of a foreign prompt", "triage {w}/run", "1 of 21 probes have no label",
         edited("probes.json", lambda p: {**p, "pt_ids": [*p["pt_ids"], "stranger"]})),
    Case("probes gone", "triage {w}/run", "no probes.json yet: run `pivottrace probe` first",
         lambda w: (w / "run/probes.json").unlink()),
    Case("plan torn", "annotate export {w}/run {w}/q.csv", r"plan\.parquet .*Parquet",
         torn("plan.parquet")),
    Case("plan of an older version", "annotate export {w}/run {w}/q.csv",
         r"plan\.parquet .*lacks.* rank", table("plan.parquet",
         lambda t: t.drop_columns(["rank"]))),
    Case("plan gone", "train {w}/run", "no plan.parquet yet: run `pivottrace triage` first",
         lambda w: (w / "run/plan.parquet").unlink()),
    Case("triage.json torn", "report {w}/run", r"triage\.json is not .*JSON", torn("triage.json")),
    Case("validation torn", "evaluate {w}/run before", r"val\.parquet .*Parquet",
         torn("val.parquet")),
    Case("evaluation torn", "report {w}/run", r"validation\.json is not .*JSON",
         replaced("validation.json", b'{"bef')),
    Case("evaluation a list", "report {w}/run", "validation.json does not hold",
         replaced("validation.json", b"[]")),
    Case("evaluation of words", "report {w}/run", r"validation\.json .*mean",
         replaced("validation.json", b'{"before": {"mean": "x"}, "after": {"mean": 1}}')),
    Case("summary a list", "report {w}/run", "summary.json does not hold",
         replaced("summary.json", b"[]")),
    Case("triage.json a list", "report {w}/run", "triage.json does not hold",
         replaced("triage.json", b"[]")),
    Case("triage.json without a curve", "report {w}/run", r"triage\.json .*curve",
         replaced("triage.json", b"{}")),
    Case("detector of another version", "report {w}/run", r"detector.*magic",
         edited("manifest.json", lambda m: {**m, "detector": {"magic": 1}})),
    Case("detector a list", "report {w}/run", "detector",
         edited("manifest.json", lambda m: {**m, "detector": [1]})),
    Case("settings of another version", SCORE, "settings",
         edited("manifest.json", lambda m: {**m, "settings": {"score": {"rollouts": 8}}})),
    Case("traces, JSON torn", "report {w}/run", r"part-00000\.json .*JSON", traces('{"<a>')),
    Case("traces, JSON a list", "report {w}/run", r"part-00000\.json", traces([1])),
    Case("traces, names of others", "report {w}/run", r"part-00000\.json .*'x/y'",
         traces({"x/y": 1})),
    Case("traces without tokens", "report {w}/run", r"part-00000\.json .*tokens",
         traces({"<a>/0": {}})),
    Case("traces, tensors torn", "report {w}/run", r"part-00000\.safetensors",
         traces(TOKENS, b"\x09")),
    Case("traces, tensors a pickle", "report {w}/run", r"part-00000\.safetensors",
         traces(TOKENS, PICKLE)),
    Case("traces, lengths differ", "report {w}/run", "1 rows, but its JSON has 2 tokens",
         traces({"<a>/0": {"tokens": ["a", "b"]}})),
    Case("labels bought are missing", "train {w}/run", "prompts on route annotate have no label"),
    Case("no evaluation of a model not trained", "evaluate {w}/run after", "is not trained yet"),
    Case("evaluation at another time", "evaluate {w}/run during", "`before` or `after`"),
]  # fmt: skip


def setting(verb: str, words: str, says: str) -> Case:
    return Case(f"{verb} {words}", f"{verb} {{w}}/run {words}", says)


SETTINGS = [
    setting("triage", "--budget -1", "label budget is -1, but must not be negative"),
    setting("triage", "--budget nan", "--budget"),
    setting("triage", "--budget 1.5", "--budget"),
    setting("triage", "--mastered 0", r"mastered is 0.0, but must lie in \(0, 1\]"),
    setting("triage", "--mastered 1.5", r"mastered is 1.5, but must lie in \(0, 1\]"),
    setting("triage", "--mastered nan", r"--mastered is nan, but must be a finite"),
    setting("triage", "--trusted -0.1", r"trusted is -0.1, but must lie in \(0, 1\]"),
    setting("triage", "--min-spearman inf", r"--min-spearman is inf, but must be a finite"),
    setting(
        "triage", "--priority cheap", "priority is 'cheap', but must be uncertain, .* or random"
    ),
    setting("triage", "--overflow buy", "overflow is 'buy', but must be drop or self_train"),
    setting("triage", "--estimator magic", "magic"),
    setting("probe", "--estimator magic", "magic"),
    setting("probe", "--n 0", "--n"),
    setting("probe", "--n 1000", "1000 probes were asked for, but the pool has 40 prompts"),
    setting("probe", "--seed x", "--seed"),
    setting("score", "--layers two", "--layers must be whole numbers with commas, not 'two'"),
    setting("score", "--layers -1", "-1"),
    setting("score", "--signal noise", "noise"),
    setting("score", "--temperature nan", "--temperature"),
    setting("score", "--tau nan", "--tau is nan"),
    setting("score", "--tau -1", "tau.* -1"),
    setting("score", "--rollouts 1", "--rollouts"),
    setting("train", "--order backwards", "backwards"),
    setting("train", "--min-agreement 2", "--min-agreement"),
    setting("train", "--learning-rate nan", "--learning-rate"),
    Case("unknown verb", "teach {w}/run", "No such command 'teach'"),
    Case("unknown option", "triage {w}/run --bugdet 3", "No such option:? '?--bugdet"),
    Case("argument missing", "annotate import {w}/run", "Missing argument '(?i:file)'"),
    Case("option missing", "init {w}/new", "Missing option '--pool'"),
    Case("option without its value", "triage {w}/run --budget", "--budget.* requires an argument"),
]


def costs(name: str, file: str, content: str | bytes, says: str) -> Case:
    """A file of costs; `<a>`, `<b>`, `<c>` stand for prompts that wait for a label."""
    words = f"triage {{w}}/run --budget-cost 30 --costs {{w}}/{file}"
    return Case(f"costs: {name}", words, says, a_file(file, content))


def costs_table(w: Path) -> None:
    pq.write_table(pa.table({"pt_id": ["a"], "price": [1.0]}), w / "c.parquet")


def costs_of_words(w: Path) -> None:
    pq.write_table(pa.table({"pt_id": ids(w)[:2], "cost": ["1", "much"]}), w / "c.parquet")


BUDGETS = [
    *(
        costs(f"{value} for a cost", "c.csv", f"pt_id,cost\n<a>,1\n<b>,{value}\n",
              r"1 costs in .*c\.csv are no numbers of at least 0 \(first: that of prompt \w{16}\)")
        for value in ("-1", "nan", "inf", "much", "", "1e999")
    ),
    costs("a truth value", "c.jsonl", '{"pt_id": "<a>", "cost": true}\n', "1 costs in .* no num"),
    costs("a prompt of another pool", "c.csv", "pt_id,cost\nstranger,1\n",
          r"1 costs in .*c\.csv are for prompts that are not in the pool \(first: stranger\)"),
    costs("a prompt twice", "c.csv", "pt_id,cost\n<a>,1\n<a>,2\n",
          r"c\.csv names prompt \w{16} more than once"),
    costs("a column missing", "c.csv", "pt_id,price\n<a>,1\n", "no column cost; .* pt_id, price"),
    costs("a torn line", "c.jsonl", '{"pt_id": "<a>", "co', r"Line 1 of .*c\.jsonl is not JSON"),
    costs("broken UTF-8", "c.csv", b"pt_id,cost\n\xff,1\n", r"c\.csv is not UTF-8"),
    costs("half a surrogate pair", "c.jsonl", '{"pt_id": "\\ud800", "cost": 1}\n', "c.jsonl"),
    costs("unknown suffix", "c.txt", "", r"c\.txt is neither"),
    costs("an export of a tool", "c.json", "[]", r"c\.json is no table"),
    costs("a pickle", "c.parquet", PICKLE, r"c\.parquet is not a readable Parquet file"),
    Case("costs: Parquet without the column", "triage {w}/run --costs {w}/c.parquet",
         "no column cost; .* pt_id, price", costs_table),
    Case("costs: Parquet of words", "triage {w}/run --costs {w}/c.parquet",
         r"c\.parquet is no file of costs", costs_of_words),
    Case("costs: no such file", "triage {w}/run --costs {w}/none.csv", "none.csv .* no such file"),
    Case("costs: a folder", "triage {w}/run --costs {w}/d.csv", r"d\.csv .*: is a directory",
         lambda w: (w / "d.csv").mkdir()),
    setting("triage", "--budget-cost -1", "budget of costs is -1.0, but must be .* not negative"),
    setting("triage", "--budget-cost nan", "--budget-cost is nan, but must be a finite"),
    setting("triage", "--budget-cost inf", "--budget-cost is inf, but must be a finite"),
    setting("triage", "--budget-cost 30 --budget 30", "30 labels and one of 30 in cost"),
    setting("triage", "--quota 'math=3'", "from the source 'math', which has a quota; .* 'sums'"),
    setting("triage", "--floor 'math=3'", "from the source 'math', which has a floor; .* 'sums'"),
    setting("triage", "--quota sums", "--quota must be SOURCE=N .*, not 'sums'"),
    setting("triage", "--quota sums=-1", "--quota must be SOURCE=N .*, not 'sums=-1'"),
    setting("triage", "--quota sums=1.5", "--quota must be SOURCE=N .*, not 'sums=1.5'"),
    setting("triage", "--floor =3", "--floor must be SOURCE=N .*, not '=3'"),
    setting("triage", "--floor sums=2 --floor sums=3", "--floor names the source 'sums' twice"),
    setting("triage", "--budget 30 --floor sums=31", "add up to 31 labels, more than .* of 30"),
    setting("triage", "--budget-cost 21 --floor sums=25", "floors .* but of the budget only 1 is"),
    setting("triage", "--floor sums=9 --quota sums=8", "floor of 9 labels, more than its quota"),
    setting("triage", "--max-unanswered 1.5", r"max_unanswered is 1.5, but must lie in \[0, 1\]"),
    setting("triage", "--max-truncated -0.1", r"max_truncated is -0.1, but must lie in \[0, 1\]"),
    setting("triage", "--max-truncated nan", "--max-truncated is nan, but must be a finite"),
    setting("triage", "--seed -1", "the seed -1, but needs"),
]  # fmt: skip


def labelled(then: Callable[[Path], object] = lambda w: None) -> Callable[[Path], object]:
    """All labels of the queue bought."""

    def arrange(w: Path) -> None:
        good("annotate import {w}/run {w}/labels.csv", w)
        then(w)

    return arrange


def a_data_set(name: str) -> Callable[[Path], object]:
    """Training data of verl's own, as its examples make them."""
    row = {"prompt": CHAT, "extra_info": {"split": "train", "index": 0}}
    return lambda w: pq.write_table(pa.Table.from_pylist([row]), w / name)


EXPORTS = [
    Case("export: labels are missing", "export {w}/run {w}/out",
         "10 prompts on route annotate have no label yet"),
    Case("export: in a file's place", "export {w}/run {w}/pool.jsonl",
         r"pool\.jsonl/train\.parquet cannot be written", labelled()),
    Case("export: over a data set", "export {w}/run {w}",
         r"train\.parquet is there already and did not come from an export",
         labelled(a_data_set("train.parquet"))),
    Case("export: over a validation set", "export {w}/run {w}",
         r"val\.parquet is there already and did not come from an export",
         labelled(a_data_set("val.parquet"))),
    Case("export: over a table of others", "export {w}/run {w}", r"train\.parquet is there already",
         labelled(lambda w: pq.write_table(pa.table({"a": [1]}), w / "train.parquet"))),
    Case("export: in a table's place, a folder", "export {w}/run {w}",
         r"train\.parquet cannot be written: is a directory",
         labelled(lambda w: (w / "train.parquet").mkdir())),
    Case("export: of a plan with a prompt less", "export {w}/run {w}/out",
         r"plan\.parquet in .* does not hold the run's prompts",
         table("plan.parquet", lambda t: t.slice(1))),
    Case("export: unknown route", "export {w}/run {w}/r.csv --route nowhere",
         "no route 'nowhere', only annotate, self_train, drop, review"),
    Case("export: a route and votes", "export {w}/run {w}/r.csv --route drop --with-self-train",
         "--with-self-train has no meaning there"),
    Case("export: a route over labels", "export {w}/run {w}/labels.csv --route drop",
         r"labels\.csv is there already and is no list of a route"),
    Case("export: a route over a pool", "export {w}/run {w}/pool.jsonl --route drop",
         r"pool\.jsonl is there already and is no list of a route"),
    Case("export: a route in a folder's place", "export {w}/run {w}/d.csv --route drop",
         r"d\.csv is there already", lambda w: (w / "d.csv").mkdir()),
    Case("export: a route as a document", "export {w}/run {w}/r.pdf --route drop",
         r"r\.pdf is neither"),
]  # fmt: skip

CASES = [*MANIFESTS, *CHANGED, *SETTINGS, *BUDGETS, *EXPORTS]
