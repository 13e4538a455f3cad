"""The scores by column, and what the probes add to them.

Contract: the scores are a pyarrow Table of up to millions of rows, and only the probes' rows are
ever looked at one by one; a list of dicts is turned into a table once, at the door. An unknown
value (null or NaN) is NaN in every array here.

    table = as_table(scores)
    probed = probe_columns(table, probes)
    probed.scores["entropy"], probed.wrong

Axes: P prompts, N probes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pivottrace_verl.calibration import PREFIX, Floats, Outcome
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.estimators import NEED_HIDDEN_STATES, NEED_TRACES

FEATURES = "features/"
"""Columns of the scores that hold a feature of the attention begin so."""


def as_table(scores: Any) -> pa.Table:
    """A table as it is; dicts as a table of id, length, estimators and features."""
    if isinstance(scores, pa.Table):
        return scores
    rows = list(scores)
    wanted = (PREFIX, FEATURES, "length_mean")
    names = [name for name in (rows[0] if rows else {}) if name.startswith(wanted)]
    columns = {name: pa.array([row[name] for row in rows], pa.float64()) for name in names}
    return pa.table({"pt_id": pa.array([row["pt_id"] for row in rows], pa.string()), **columns})


def estimators_in(table: pa.Table) -> list[str]:
    """Names of the estimators the scores hold, in their order."""
    return [n.removeprefix(PREFIX) for n in table.column_names if n.startswith(PREFIX)]


def ids_of(table: pa.Table) -> list[str]:
    """[P] the prompts' ids."""
    ids: list[str] = table.column("pt_id").to_pylist()
    return ids


def numbers(table: pa.Table, name: str) -> Floats:
    """[P] one column; null is NaN."""
    column = pc.cast(table.column(name), pa.float64())
    return np.array(column.to_numpy(), dtype=np.float64)


def traced_rollouts(table: pa.Table) -> tuple[int, int]:
    """How many rollouts have an attention trace, and how many there are."""
    rollouts = [one for row in table.column("rollouts").to_pylist() for one in row]
    return sum(one["traced"] for one in rollouts), len(rollouts)


def estimator_values(table: pa.Table, estimator: str) -> Floats:
    """[P] raw values. PivotTraceError if the scores do not have the estimator, or no value of it:
    ranks would be those of the ids."""
    names = estimators_in(table)
    if estimator not in names:
        raise PivotTraceError(
            f"The scores have no estimator '{estimator}', only {', '.join(names) or 'none'}."
        )
    values = numbers(table, PREFIX + estimator)
    if len(values) and np.isnan(values).all():
        raise PivotTraceError(
            f"The estimator '{estimator}' is not scored: none of the {len(values)} prompts has a "
            f"value{hint(estimator)}."
        )
    return values


def hint(estimator: str) -> str:
    """What an estimator without any value needs, to end a sentence with."""
    if estimator in NEED_HIDDEN_STATES:
        return ", since it needs the pool scored with --hidden-states"
    if estimator in NEED_TRACES:
        return ", since it needs the pool scored with --capture on or --capture replay"
    return ""


@dataclass(frozen=True)
class Probed:
    """What the scores and the labels say about the probes, in the order of their ids."""

    rows: NDArray[np.int64]
    """[N] where the probe stands in the scores."""
    pass_rate: Floats
    """[N] in [0, 1]."""
    wrong: NDArray[np.bool_]
    """[N] the majority answer is wrong; no majority counts as wrong."""
    length: Floats
    """[N] mean tokens of a rollout."""
    columns: dict[str, Floats]
    """[N] each: every estimator and feature, by its column's name."""

    @property
    def scores(self) -> dict[str, Floats]:
        """[N] each: every estimator, by its own name."""
        return {
            name.removeprefix(PREFIX): values
            for name, values in self.columns.items()
            if name.startswith(PREFIX)
        }


def probe_columns(table: pa.Table, probes: Iterable[Outcome]) -> Probed:
    """The probes among the scores; probes that are not scored are left out."""
    # In the order of their ids, so that no draw depends on the order of files.
    found = sorted({outcome.pt_id: outcome for outcome in probes}.items())
    ids = table.column("pt_id")
    wanted = pa.array([pt_id for pt_id, _ in found], type=ids.type)
    places = pc.index_in(wanted, value_set=ids.combine_chunks()).to_pylist()
    known = [
        (at, outcome) for at, (_, outcome) in zip(places, found, strict=True) if at is not None
    ]
    rows = np.array([at for at, _ in known], dtype=np.int64)
    names = [n for n in table.column_names if n.startswith((PREFIX, FEATURES))]
    taken = table.select([*names, "length_mean"] if "length_mean" in table.column_names else names)
    taken = taken.take(pa.array(rows))
    return Probed(
        rows=rows,
        pass_rate=np.array([outcome.pass_rate for _, outcome in known], dtype=np.float64),
        wrong=np.array([not outcome.majority_right for _, outcome in known], dtype=bool),
        length=(
            numbers(taken, "length_mean")
            if "length_mean" in taken.column_names
            else np.full(len(rows), np.nan)
        ),
        columns={name: numbers(taken, name) for name in names},
    )
