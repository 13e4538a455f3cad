"""One row of the scores: a rollout is right or wrong, unparseable, or timed out."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest

from pivottrace_verl import answer_pool
from pivottrace_verl.answer_pool import TIMED_OUT, Limits
from pivottrace_verl.answers import extract_many, get_answers
from pivottrace_verl.attention.channel import Trace
from pivottrace_verl.generation import Rollout
from pivottrace_verl.pivots import FEATURES, DetectorConfig
from pivottrace_verl.pool import Prompt
from pivottrace_verl.schemas import SCORE_SCHEMA
from pivottrace_verl.score_columns import traced_rollouts
from pivottrace_verl.score_rows import make_row, write_traces
from pivottrace_verl.traces import calibrate

HANGS = r"\boxed{" + "(" * 50_000 + "1" + ")" * 50_000 + "}"
TEXTS = [r"\boxed{7}", r"\boxed{7.0}", "I cannot say", HANGS]
PROMPT = Prompt("p0", [{"role": "user", "content": "3 + 4?"}], "sums")


class Tokenizer:
    def decode(self, ids):
        return "".join(f"<{i}>" for i in ids)


@pytest.fixture
def limits():
    answer_pool.set_limits(Limits(workers=1, seconds=1.0))
    yield
    answer_pool.close()


def make_rollout(text, n=6):
    g = np.random.default_rng(0)
    stats = g.random((n, 1, 1, len(FEATURES)), np.float32)
    trace = Trace("k", stats, g.random(n, np.float32), g.random(n, np.float32))
    return Rollout(list(range(n)), text, False, -0.5, trace)


def test_what_is_not_read_in_time_is_timed_out_and_not_unparseable(limits, tmp_path):
    kind, rollouts = get_answers("math"), [make_rollout(text) for text in TEXTS]
    answers = extract_many(kind, TEXTS)
    assert answers == ["7", "7", None, TIMED_OUT]
    traces = [(r.trace.stats, r.trace.token_entropy) for r in rollouts]
    frozen = calibrate(traces, DetectorConfig())
    row = make_row(PROMPT, rollouts, answers, [None] * 4, kind=kind, thresholds=frozen, seed=0)
    assert set(row) == set(SCORE_SCHEMA.names)
    assert (row["unparseable"], row["timed_out"]) == (1, 1)
    assert row["answers"] == [{"answer": "7", "count": 2}] and row["majority"] == "7"
    assert [rollout["answer"] for rollout in row["rollouts"]] == ["7", "7", None, None]

    write_traces(tmp_path, [PROMPT], [rollouts[2:]], [answers[2:]], tokenizer=Tokenizer(), seed=0)
    kept = json.loads((tmp_path / "part-00000.json").read_text())
    assert [kept[f"p0/{g}"]["answer"] for g in range(2)] == [None, None]


def test_a_rollout_whose_trace_was_lost_counts_in_everything_but_the_attention(tmp_path):
    kind = get_answers("exact")
    traced = [make_rollout("7"), make_rollout("8")]
    lost = dataclasses.replace(traced[0], trace=None)
    frozen = calibrate([(r.trace.stats, r.trace.token_entropy) for r in traced], DetectorConfig())

    def scored(rollouts):
        texts = extract_many(kind, [rollout.text for rollout in rollouts])
        unknown = [None] * len(rollouts)
        return make_row(PROMPT, rollouts, texts, unknown, kind=kind, thresholds=frozen, seed=0)

    row, whole = scored([*traced, lost]), scored(traced)
    assert [rollout["traced"] for rollout in row["rollouts"]] == [True, True, False]
    assert row["rollouts"][2]["pivots"] is row["rollouts"][2]["entropy"] is None
    assert row["answers"] == [{"answer": "7", "count": 2}, {"answer": "8", "count": 1}]
    for name in ("uncertainty/pivot_count", "uncertainty/entropy"):
        assert row[name] == pytest.approx(whole[name])
    table = pa.Table.from_pylist([row, whole], schema=SCORE_SCHEMA)
    assert traced_rollouts(table) == (4, 5)
    write_traces(
        tmp_path, [PROMPT], [[lost, traced[0]]], [["7", "7"]], tokenizer=Tokenizer(), seed=0
    )
    assert list(json.loads((tmp_path / "part-00000.json").read_text())) == ["p0/1"]
