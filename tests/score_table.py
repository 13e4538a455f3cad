"""Scores for tests, fed by the schema: a new column breaks no test that does not look at it.

score_row("a", [("7", 5), ("8", 3)], unparseable=2)     # 10 rollouts, majority "7"
score_table(["a", "b"], {"uncertainty/entropy": [0.1, 0.9]})
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from pivottrace_verl.schemas import SCORE_SCHEMA

ESTIMATES = ("uncertainty/", "features/")


def score_row(
    pt_id: str,
    answers: Sequence[tuple[str, int]] = (("1", 4),),
    estimate: float | None = 0.5,
    **columns: Any,
) -> dict[str, Any]:
    """One prompt whose rollouts gave `answers`, (answer, count) in any order; counts of 0 are left
    out. Every estimator and feature is `estimate`; `columns` replace what is there."""
    strangers = set(columns) - set(SCORE_SCHEMA.names)
    assert not strangers, f"the scores have no {strangers}"
    clusters = [{"answer": a, "count": n} for a, n in answers if n]
    clusters.sort(key=lambda cluster: -cluster["count"])
    counts = [cluster["count"] for cluster in clusters]
    clear = counts and counts[:1] != counts[1:2]
    broken = columns.get("unparseable", 0) + columns.get("timed_out", 0)
    return {
        **{field.name: _default(field, estimate) for field in SCORE_SCHEMA},
        "pt_id": pt_id,
        "n_rollouts": sum(counts) + broken,
        "answers": clusters,
        "majority": clusters[0]["answer"] if clear else None,
        "length_mean": 10.0,
        "logprob_mean": -0.5,
        **columns,
    }


def _default(field: pa.Field, estimate: float | None) -> Any:
    if field.name.startswith(ESTIMATES):
        return estimate
    if pa.types.is_list(field.type):
        return []
    return 0 if pa.types.is_integer(field.type) else None


def score_table(pt_ids: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> pa.Table:
    """Prompts of 8 rollouts, of which those that have an answer agree, with whole `columns`; of the
    estimators and features it has those that are named, so that triage weighs no others."""
    rows = []
    for i, pt_id in enumerate(pt_ids):
        given = {name: values[i] for name, values in columns.items()}
        silent = given.get("unparseable", 0) + given.get("timed_out", 0)
        rows.append(score_row(pt_id, [("1", 8 - silent)], **given))
    table = pa.Table.from_pylist(rows, schema=SCORE_SCHEMA)
    return table.select(
        [n for n in SCORE_SCHEMA.names if n in columns or not n.startswith(ESTIMATES)]
    )
