"""The files of a run directory: the manifest, and the tables that each stage leaves.

Contract: every write is atomic; every table and JSON file names the fingerprint of what it was
made from, and reading it after that has changed raises PivotTraceError with both sides named.
`pool.RunDir` adds the pool, the ledger, the lock and how a directory is made.

Axes: P prompts.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.files import (
    file_fingerprint,
    fingerprint,
    read_object,
    read_schema,
    read_table,
    write_json_atomic,
    write_table_atomic,
    write_tables_atomic,
)
from pivottrace_verl.ledger import Ledger
from pivottrace_verl.schemas import PLAN_SCHEMA, POOL_SCHEMA, SCORE_SCHEMA


class RunFiles:
    """The stage files under one path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    # Manifest

    @property
    def manifest(self) -> dict[str, Any]:
        """manifest.json, read anew each time."""
        return read_object(self.path / "manifest.json")

    def update_manifest(self, **sections: Any) -> None:
        """Write sections; a dict is merged into the section's entries, anything else replaces."""
        manifest = self.manifest
        for name, value in sections.items():
            before = manifest.get(name)
            if isinstance(before, dict) and isinstance(value, dict):
                manifest[name] = {**before, **value}
            else:
                manifest[name] = value
        write_json_atomic(self.path / "manifest.json", manifest)

    def stage_fingerprint(self, name: str) -> str:
        """Of `pool`, `model`, `val`, `ledger` (its labels) or a file: `scores`, `plan`, `probes`,
        `triage`. PivotTraceError if that stage has not been done."""
        if name in ("pool", "model", "val"):
            if name not in self.manifest:
                raise PivotTraceError(f"The run directory {self.path} has no {name}.")
            return str(self.manifest[name]["fingerprint"])
        if name == "ledger":
            return self.ledger().fingerprint()
        files = {n: f"{n}.parquet" for n in ("scores", "plan")}
        files |= {n: f"{n}.json" for n in ("probes", "triage")}
        return file_fingerprint(self._need(files[name], name))

    def ledger(self) -> Ledger:
        """The labels bought for this run."""
        return Ledger(self.path / "ledger.jsonl")

    # Pool

    def pool_table(self, columns: list[str] | None = None) -> pa.Table:
        """[P] columns of `POOL_SCHEMA`, in the pool's order."""
        wanted = columns or POOL_SCHEMA.names
        made_from = {"pool": self.stage_fingerprint("pool")}
        read = list(dict.fromkeys(["pt_id", *wanted]))
        table = self._read_table("pool.parquet", made_from, POOL_SCHEMA, read)
        return self._all_prompts("pool.parquet", table).select(wanted)

    # Scores

    def _made_from(self) -> dict[str, str]:
        return {name: self.stage_fingerprint(name) for name in ("pool", "model")}

    def write_score_part(self, i: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """scores/part-0000i.parquet, one row a prompt, columns of `SCORE_SCHEMA`."""
        name = f"scores/part-{i:05d}.parquet"
        self._write_table(name, _from_rows(name, rows, SCORE_SCHEMA), self._made_from())

    def finished_parts(self) -> set[int]:
        """Numbers of the parts that are written."""
        found = set()
        for path in (self.path / "scores").glob("part-*.parquet"):
            number = path.stem.removeprefix("part-")
            if not (number.isascii() and number.isdigit()):
                raise PivotTraceError(f"{path} is not a part of the scores: take it away.")
            found.add(int(number))
        return found

    def check_score_parts(self) -> None:
        """PivotTraceError if a finished part lacks a column, or was made from something else: by
        the files' footers alone, which say both; `merge_scores` reads the rows."""
        made_from = self._made_from()
        for i in sorted(self.finished_parts()):
            self._check_table(f"scores/part-{i:05d}.parquet", made_from, SCORE_SCHEMA)

    def merge_scores(self) -> None:
        """All parts -> scores.parquet, in the pool's order. PivotTraceError unless every prompt
        of the pool is there exactly once, part after part as the pool has them."""
        made_from = self._made_from()
        pool = self.pool_table(["pt_id"])["pt_id"]
        parts = self._parts_in_order(pool, made_from)
        write_tables_atomic(self.path / "scores.parquet", parts, _note(made_from))

    def _parts_in_order(
        self, pool: pa.ChunkedArray, made_from: Mapping[str, str]
    ) -> Iterator[pa.Table]:
        """The parts, their rows in the pool's order."""
        done = 0
        for i in sorted(self.finished_parts()):
            part = self._read_table(f"scores/part-{i:05d}.parquet", made_from, SCORE_SCHEMA)
            at = pc.index_in(pool.slice(done, part.num_rows), value_set=part["pt_id"])
            if len(at) < part.num_rows or at.null_count:
                raise self._not_complete(pool)
            done += part.num_rows
            yield part.take(at)
        if done < len(pool):
            raise self._not_complete(pool)

    def _not_complete(self, pool: pa.ChunkedArray) -> PivotTraceError:
        """Why the parts are not the pool's prompts, each once and in order."""
        scored: set[str] = set()
        for i in sorted(self.finished_parts()):
            name = f"scores/part-{i:05d}.parquet"
            for pt_id in read_table(self.path / name, ["pt_id"])["pt_id"].to_pylist():
                if pt_id in scored:
                    return PivotTraceError(
                        f"Prompt {pt_id} is scored twice, the second time in {name}."
                    )
                scored.add(pt_id)
        ids = set(pool.to_pylist())
        missing, strangers = len(ids - scored), len(scored - ids)
        if missing or strangers:
            return PivotTraceError(
                f"The scores in {self.path} are not complete: {missing} of {len(ids)} prompts "
                f"have none, {strangers} scored prompts are not in the pool."
            )
        return PivotTraceError(
            f"The scores in {self.path} are not in the pool's order: a part holds prompts that "
            "belong into another one."
        )

    def scores(self, *, rollouts: bool = True, columns: list[str] | None = None) -> pa.Table:
        """One row a prompt, in the pool's order; columns of `SCORE_SCHEMA`, or only `columns` of
        them, pt_id among these. Without `rollouts` that column, the bulk of the file, is not
        read."""
        self._need("scores.parquet", "scores")
        wanted = [name for name in SCORE_SCHEMA.names if rollouts or name != "rollouts"]
        made_from = self._made_from()
        table = self._read_table("scores.parquet", made_from, SCORE_SCHEMA, columns or wanted)
        return self._all_prompts("scores.parquet", table)

    # Probes and plan

    def write_probes(self, estimator: str, seed: int, pt_ids: Sequence[str]) -> None:
        """probes.json: which prompts' labels calibrate the ranking."""
        probes = {
            "fingerprint_of_scores": self.stage_fingerprint("scores"),
            "estimator": estimator,
            "seed": seed,
            "pt_ids": list(pt_ids),
        }
        write_json_atomic(self.path / "probes.json", probes)

    def probes(self) -> dict[str, Any]:
        """probes.json; PivotTraceError if the scores have changed since."""
        probes = read_object(self._need("probes.json", "probes"))
        if not {"fingerprint_of_scores", "pt_ids"} <= set(probes):
            raise PivotTraceError(
                f"probes.json in {self.path} holds no fingerprint_of_scores and pt_ids: draw the "
                "probes again."
            )
        made, now = probes["fingerprint_of_scores"], self.stage_fingerprint("scores")
        if made != now:
            raise PivotTraceError(
                f"probes.json in {self.path} was made from the scores {made}, but the scores are "
                f"now {now}: draw the probes again."
            )
        return probes

    def write_plan(
        self, rows: pa.Table | Sequence[Mapping[str, Any]], info: Mapping[str, Any]
    ) -> None:
        """plan.parquet (columns of `PLAN_SCHEMA`) and triage.json, each naming the scores. In rows
        that are dicts a cost is 1 unless given."""
        made_from = {"scores": self.stage_fingerprint("scores")}
        probes = fingerprint(sorted(self.ledger().labels("probe").items()))
        if not isinstance(rows, pa.Table):
            rows = _from_rows("the plan", [{"cost": 1.0, **row} for row in rows], PLAN_SCHEMA)
        self._write_table("plan.parquet", rows, made_from)
        made_from |= {"probe_labels": probes, "plan": self.stage_fingerprint("plan")}
        write_json_atomic(self.path / "triage.json", {**info, "made_from": made_from})

    def plan(self) -> pa.Table:
        """One row a prompt, in the pool's order; PivotTraceError if the scores have changed."""
        self._need("plan.parquet", "plan")
        made_from = {"scores": self.stage_fingerprint("scores")}
        table = self._read_table("plan.parquet", made_from, PLAN_SCHEMA)
        return self._all_prompts("plan.parquet", table)

    def triage(self) -> dict[str, Any]:
        """triage.json; PivotTraceError if it tells of another plan than plan.parquet, as a killed
        triage leaves it."""
        info = read_object(self._need("triage.json", "plan"))
        told, now = info.get("made_from", {}).get("plan"), self.stage_fingerprint("plan")
        if told not in (None, now):
            raise PivotTraceError(
                f"triage.json in {self.path} tells of the plan {told}, but plan.parquet is {now}: "
                "triage again."
            )
        return info

    # Files

    def _need(self, name: str, stage: str) -> Path:
        path = self.path / name
        if not path.exists():
            verb = {"scores": "score", "probes": "probe"}.get(stage, "triage")
            raise PivotTraceError(
                f"The run directory {self.path} has no {name} yet: run `pivottrace {verb}` first."
            )
        return path

    def _write_table(self, name: str, table: pa.Table, made_from: Mapping[str, str]) -> None:
        write_table_atomic(self.path / name, table.replace_schema_metadata(_note(made_from)))

    def _read_table(
        self,
        name: str,
        made_from: Mapping[str, str],
        schema: pa.Schema,
        columns: list[str] | None = None,
    ) -> pa.Table:
        """A table of this run, or only `columns` of it, if `_check_table` does not refuse it."""
        self._check_table(name, made_from, schema)
        return read_table(self.path / name, columns or schema.names)

    def _check_table(self, name: str, made_from: Mapping[str, str], schema: pa.Schema) -> None:
        """Refuse a table that was made from other things or whose columns are not those of
        `schema`, before any of its rows is read."""
        found = read_schema(self.path / name)
        note = _read_note(found)
        for what, now in made_from.items():
            if note.get(what) != now:
                raise PivotTraceError(
                    f"{name} in {self.path} was made from {what} {note.get(what, 'unknown')}, "
                    f"but the run now has {what} {now}: make {name} again."
                )
        self._check_columns(name, found, schema)

    def _check_columns(self, name: str, found: pa.Schema, wanted: pa.Schema) -> None:
        """Refuse a table of another version, naming the columns that differ."""
        lacks = [column for column in wanted.names if column not in found.names]
        more = [column for column in found.names if column not in wanted.names]
        other = [
            column
            for column in wanted.names
            if column not in lacks and found.field(column).type != wanted.field(column).type
        ]
        parts = (("lacks", lacks), ("adds", more), ("has another type of", other))
        faults = [f"{verb} {', '.join(columns)}" for verb, columns in parts if columns]
        if faults:
            raise PivotTraceError(
                f"{name} in {self.path} is of another version: it {' and '.join(faults)}; make "
                f"{name} again."
            )

    def _all_prompts(self, name: str, table: pa.Table) -> pa.Table:
        """The table, if it has a row for each prompt of the pool, in the pool's order."""
        made_from = self.stage_fingerprint("pool")
        found = fingerprint(table["pt_id"].to_pylist())
        if found != made_from:
            raise PivotTraceError(
                f"{name} in {self.path} does not hold the run's prompts: its own are {found}, but "
                f"the run was made from {made_from}."
            )
        return table


_NOTE = b"pivottrace.made_from"


def _note(made_from: Mapping[str, str]) -> dict[bytes, str]:
    """Metadata of a table that says what it was made from."""
    return {_NOTE: json.dumps(dict(made_from), sort_keys=True)}


def _read_note(schema: pa.Schema) -> dict[str, Any]:
    """What a table says it was made from; nothing if it is not ours."""
    try:
        note = json.loads((schema.metadata or {}).get(_NOTE, b"{}"))
    except ValueError:
        return {}
    return note if isinstance(note, dict) else {}


def _from_rows(name: str, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    for row in rows:
        if set(row) != set(schema.names):
            odd = ", ".join(sorted(set(row) ^ set(schema.names)))
            raise ValueError(f"a row of {name} lacks or should not have: {odd}")
    return pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
