"""Budget: which of the prompts to annotate are bought, and what a label costs.

Contract: buys in the stated priority until the budget (labels or cost) or a data source's quota
leaves no room; a prompt that is too dear is passed over for a cheaper one behind it. Floors are
bought before all else. Labels bought already count against every number. Which label a prompt has
is never looked at.

Axes: P prompts, W prompts to annotate without a label, S data sources.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pivottrace_verl.annotation.formats import table_of
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.files import first_line, read_table
from pivottrace_verl.plan import TriageConfig

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

BOUGHT, NO_BUDGET, NO_QUOTA = 0, 1, 2
_TOLERANCE = 1e-9
"""Sums of tenths miss their exact value by a rounding error."""


@dataclass(frozen=True)
class Market:
    """What buying needs to know of the pool."""

    cost: Floats
    """[P] of a label, finite, not negative."""
    source: NDArray[np.int32]
    """[P] place of the prompt's data source in `names`."""
    names: list[str]
    """[S] the data sources."""
    owned: NDArray[np.bool_]
    """[P] whether the label was bought already."""
    spent: float
    """Cost of all labels bought so far."""


@dataclass(frozen=True)
class Purchase:
    """What became of the prompts to annotate."""

    fate: NDArray[np.int8]
    """[W] BOUGHT, NO_BUDGET or NO_QUOTA."""
    sources: list[dict[str, Any]]
    """One row a data source that has a quota or a floor; empty if none has."""
    notes: list[str]


def by_priority(wanted: Indices, u: Floats, ids: pa.Array, cost: Floats, cfg: TriageConfig) -> Any:
    """`wanted`, in the order in which a binding budget buys.

    The random order depends on the pool's ids and the seed alone, so that it stays when the
    thresholds or the labels change.
    """
    if cfg.priority == "random":
        place = np.empty(len(ids), dtype=np.intp)
        rng = np.random.default_rng(cfg.seed)
        place[np.asarray(pc.sort_indices(ids))] = rng.permutation(len(ids))
        return wanted[np.argsort(place[wanted])]
    sure, price = u[wanted], cost[wanted]
    if cfg.priority == "threshold":
        return wanted[np.argsort(sure)]
    if cfg.priority == "cheapest":
        worth = np.divide(sure, price, out=np.full(len(wanted), math.inf), where=price > 0)
        return wanted[np.lexsort((-sure, -worth))]
    return wanted[np.argsort(-sure)]


def buy(wanted: Indices, market: Market, cfg: TriageConfig) -> Purchase:
    """Spend the budget on `wanted` [W], indices of prompts in the order of priority.

    Raises PivotTraceError for a quota or a floor of a source that no prompt has, and for floors
    that what is left of the budget cannot pay.
    """
    _check_names(market.names, cfg)
    bought_before = np.bincount(market.source[market.owned], minlength=len(market.names))
    quota = [cfg.quotas.get(name, math.inf) for name in market.names]
    room = [most - n for most, n in zip(quota, bought_before.tolist(), strict=True)]
    labels = math.inf if cfg.budget is None else max(0, cfg.budget - int(market.owned.sum()))
    money = math.inf if cfg.budget_cost is None else max(0.0, cfg.budget_cost - market.spent)
    source, price = market.source[wanted], market.cost[wanted]
    fate = np.full(len(wanted), BOUGHT, dtype=np.int8)
    first, notes = _floors(source, bought_before, market.names, cfg)
    if len(first) > labels or price[first].sum() > money + _TOLERANCE:
        raise PivotTraceError(
            f"The floors of the sources need {len(first)} more labels that cost "
            f"{price[first].sum():g}, but of the budget only "
            + (f"{money:g} is" if cfg.budget is None else f"{labels:g} labels are")
            + " left after what was bought already."
        )
    if cfg.quotas or labels < len(wanted) or money < price.sum():
        rest = np.setdiff1d(np.arange(len(wanted)), first)
        turns = np.concatenate([first, rest])
        columns = (turns.tolist(), source[turns].tolist(), price[turns].tolist())
        for turn, where, asked in zip(*columns, strict=True):
            if room[where] < 1:
                fate[turn] = NO_QUOTA
            elif labels < 1 or asked > money + _TOLERANCE:
                fate[turn] = NO_BUDGET
            else:
                room[where] -= 1
                labels -= 1
                money -= asked
    return Purchase(fate, _table(source, fate, bought_before, market.names, cfg), notes)


def _check_names(names: list[str], cfg: TriageConfig) -> None:
    for what, numbers in (("quota", cfg.quotas), ("floor", cfg.floors)):
        for name in numbers:
            if name not in names:
                known = ", ".join(f"'{other}'" for other in names[:8])
                more = f" and {len(names) - 8} more" if len(names) > 8 else ""
                raise PivotTraceError(
                    f"No prompt comes from the source '{name}', which has a {what}; the pool's "
                    f"sources are {known}{more}."
                )


def _floors(
    source: NDArray[np.int32],
    bought_before: NDArray[np.int64],
    names: list[str],
    cfg: TriageConfig,
) -> tuple[Indices, list[str]]:
    """Places in `wanted` of the prompts that the floors buy, and what they cannot reach."""
    chosen: list[Indices] = [np.empty(0, dtype=np.intp)]
    notes = []
    for name, floor in cfg.floors.items():
        have = int(bought_before[names.index(name)])
        found = np.flatnonzero(source == names.index(name))
        chosen.append(found[: max(0, floor - have)])
        if len(found) + have < floor:
            notes.append(
                f"The source '{name}' has {len(found)} prompts to annotate and {have} labels, "
                f"fewer than its floor of {floor}."
            )
    return np.sort(np.concatenate(chosen)), notes


def _table(
    source: NDArray[np.int32],
    fate: NDArray[np.int8],
    bought_before: NDArray[np.int64],
    names: list[str],
    cfg: TriageConfig,
) -> list[dict[str, Any]]:
    to_buy = np.bincount(source[fate == BOUGHT], minlength=len(names))
    left_out = np.bincount(source[fate != BOUGHT], minlength=len(names))
    return [
        {
            "source": name,
            "floor": cfg.floors.get(name),
            "quota": cfg.quotas.get(name),
            "bought": int(bought_before[i]),
            "to_buy": int(to_buy[i]),
            "left_out": int(left_out[i]),
        }
        for i, name in enumerate(names)
        if name in cfg.quotas or name in cfg.floors
    ]


def read_costs(path: Path, ids: pa.Array) -> Floats:
    """[P] cost of each prompt's label, from a file of pt_id and cost (.jsonl, .csv, .parquet);
    1.0 where the file names none.

    Raises PivotTraceError if the file is unreadable, names a prompt twice or one that is not in
    the pool, or holds a cost that is no number of at least 0.
    """
    named, cost = _costs_of_parquet(path) if path.suffix == ".parquet" else _costs_of_rows(path)
    bad = np.flatnonzero(~(np.isfinite(cost) & (cost >= 0)))
    if len(bad):
        raise PivotTraceError(
            f"{len(bad)} costs in {path} are no numbers of at least 0 (first: that of prompt "
            f"{named[int(bad[0])].as_py()})."
        )
    place = pc.index_in(named, value_set=ids)
    if place.null_count:
        stranger = named.filter(pc.is_null(place))[0].as_py()
        raise PivotTraceError(
            f"{place.null_count} costs in {path} are for prompts that are not in the pool (first: "
            f"{stranger})."
        )
    at = np.asarray(place)
    if len(np.unique(at)) < len(at):
        twice = int(np.flatnonzero(np.bincount(at) > 1)[0])
        raise PivotTraceError(f"{path} names prompt {ids[twice].as_py()} more than once.")
    out = np.ones(len(ids))
    out[at] = cost
    return out


def _costs_of_parquet(path: Path) -> tuple[pa.Array, Floats]:
    table = read_table(path)
    missing = [name for name in ("pt_id", "cost") if name not in table.schema.names]
    if missing:
        raise PivotTraceError(
            f"{path} has no column {', '.join(missing)}; its columns are "
            f"{', '.join(table.schema.names) or 'none'}."
        )
    try:
        named = table["pt_id"].cast(pa.string()).combine_chunks()
        cost = table["cost"].cast(pa.float64())
    except pa.ArrowException as error:
        raise PivotTraceError(f"{path} is no file of costs: {first_line(error)}.") from error
    return named, np.asarray(cost.fill_null(math.nan), dtype=np.float64)


def _costs_of_rows(path: Path) -> tuple[pa.Array, Floats]:
    rows = [row for _, row in table_of(path).rows(path, ("pt_id", "cost"))]
    try:
        named = pa.array([row["pt_id"] for row in rows], pa.string())
    except UnicodeEncodeError as error:
        raise PivotTraceError(f"{path} holds a pt_id that is not valid Unicode.") from error
    return named, np.array([_number(row) for row in rows], dtype=np.float64)


def _number(row: Mapping[str, Any]) -> float:
    """The row's cost, NaN if it is none."""
    value = row["cost"]
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan
