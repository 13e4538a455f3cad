"""Schemas of the run directory's Parquet files, column by column."""

import pyarrow as pa

from pivottrace_verl.estimators import ESTIMATORS
from pivottrace_verl.traces import FEATURE_NAMES

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

POOL_SCHEMA = pa.schema(
    [
        ("pt_id", pa.string()),
        ("prompt", MESSAGES),
        ("data_source", pa.string()),
        # JSON: {"index": the row of the incoming file}.
        ("extra_info", pa.string()),
    ]
)

VAL_SCHEMA = POOL_SCHEMA.append(pa.field("label", pa.string()))

ROLLOUT = pa.struct(
    [
        ("seed", pa.int64()),
        # Null where unparseable or not read in time: the counts of the prompt tell them apart.
        ("answer", pa.string()),
        ("n_tokens", pa.int64()),
        ("truncated", pa.bool_()),
        # From here to entropy_forks: null where the rollout was not traced.
        ("pivots", pa.int64()),
        ("pivot_density", pa.float64()),
        ("entropy", pa.float64()),
        ("self_certainty", pa.float64()),
        ("entropy_forks", pa.float64()),
        ("logprob", pa.float64()),
        ("traced", pa.bool_()),
    ]
)

SCORE_SCHEMA = pa.schema(
    [
        ("pt_id", pa.string()),
        ("n_rollouts", pa.int64()),
        # Clusters of equal answers, by count descending; unparseable ones are not among them.
        ("answers", pa.list_(pa.struct([("answer", pa.string()), ("count", pa.int64())]))),
        # Null on a tie for the top or without a parseable answer.
        ("majority", pa.string()),
        ("unparseable", pa.int64()),
        # Rollouts whose answer could not be read or compared in time; not among the unparseable.
        ("timed_out", pa.int64()),
        ("truncated", pa.int64()),
        ("length_mean", pa.float64()),
        ("logprob_mean", pa.float64()),
        # Higher = more uncertain; raw, not ranked; NaN = unknown.
        *((f"uncertainty/{name}", pa.float64()) for name in ESTIMATORS),
        # Means over the traced rollouts, for estimators that are fitted; NaN = unknown.
        *((f"features/{name}", pa.float64()) for name in FEATURE_NAMES),
        ("rollouts", pa.list_(ROLLOUT)),
    ]
)

PLAN_SCHEMA = pa.schema(
    [
        ("pt_id", pa.string()),
        ("route", pa.string()),
        # Rank in [0, 1] in the direction the probes decided; 1 = most uncertain.
        ("uncertainty", pa.float64()),
        # 1 = most uncertain.
        ("rank", pa.int64()),
        ("reason", pa.string()),
        # Of the prompt's label, bought or not.
        ("cost", pa.float64()),
    ]
)
