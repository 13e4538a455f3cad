"""The files of a run directory: the manifest, and the tables that each stage leaves.

Contract: every write is atomic; every table and JSON file names the fingerprint of what it was
made from, and reading it after that has changed raises PivotTraceError with both sides named.
`pool.RunDir` adds the pool, the ledger, the lock and how a directory is made.

Axes: P prompts.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.files import (
    file_fingerprint,
    fingerprint,
    read_object,
    read_table,
    write_json_atomic,
    write_table_atomic,
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

    # Scores

    def _made_from(self) -> dict[str, str]:
        return {name: self.stage_fingerprint(name) for name in ("pool", "model")}

    def write_score_part(self, i: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """scores/part-0000i.parquet, one row a prompt, columns of `SCORE_SCHEMA`."""
        self._write_table(f"scores/part-{i:05d}.parquet", rows, SCORE_SCHEMA, self._made_from())

    def finished_parts(self) -> set[int]:
        """Numbers of the parts that are written."""
        found = set()
        for path in (self.path / "scores").glob("part-*.parquet"):
            number = path.stem.removeprefix("part-")
            if not (number.isascii() and number.isdigit()):
                raise PivotTraceError(f"{path} is not a part of the scores: take it away.")
            found.add(int(number))
        return found

    def merge_scores(self) -> None:
        """All parts -> scores.parquet, in the pool's order. PivotTraceError unless every prompt
        of the pool is there exactly once."""
        made_from = self._made_from()
        rows: dict[str, dict[str, Any]] = {}
        for i in sorted(self.finished_parts()):
            name = f"scores/part-{i:05d}.parquet"
            for row in self._read_table(name, made_from, SCORE_SCHEMA).to_pylist():
                if row["pt_id"] in rows:
                    raise PivotTraceError(
                        f"Prompt {row['pt_id']} is scored twice, the second time in {name}."
                    )
                rows[row["pt_id"]] = row
        pool = self._read_table("pool.parquet", {"pool": made_from["pool"]}, POOL_SCHEMA)
        ids = pool.column("pt_id").to_pylist()
        missing = [i for i in ids if i not in rows]
        if missing or len(rows) > len(ids):
            raise PivotTraceError(
                f"The scores in {self.path} are not complete: {len(missing)} of {len(ids)} prompts "
                f"have none, {len(rows) + len(missing) - len(ids)} scored prompts are not in the "
                "pool."
            )
        self._write_table("scores.parquet", [rows[i] for i in ids], SCORE_SCHEMA, made_from)

    def scores(self) -> pa.Table:
        """One row a prompt, in the pool's order; columns of `SCORE_SCHEMA`."""
        self._need("scores.parquet", "scores")
        return self._read_table("scores.parquet", self._made_from(), SCORE_SCHEMA)

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

    def write_plan(self, rows: Sequence[Mapping[str, Any]], info: Mapping[str, Any]) -> None:
        """plan.parquet (columns of `PLAN_SCHEMA`) and triage.json, each naming the scores."""
        made_from = {"scores": self.stage_fingerprint("scores")}
        probes = fingerprint(sorted(self.ledger().labels("probe").items()))
        self._write_table("plan.parquet", rows, PLAN_SCHEMA, made_from)
        made_from |= {"probe_labels": probes, "plan": self.stage_fingerprint("plan")}
        write_json_atomic(self.path / "triage.json", {**info, "made_from": made_from})

    def plan(self) -> pa.Table:
        """One row a prompt, in the pool's order; PivotTraceError if the scores have changed."""
        self._need("plan.parquet", "plan")
        made_from = {"scores": self.stage_fingerprint("scores")}
        return self._read_table("plan.parquet", made_from, PLAN_SCHEMA)

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

    def _write_table(
        self,
        name: str,
        rows: Sequence[Mapping[str, Any]],
        schema: pa.Schema,
        made_from: Mapping[str, str],
    ) -> None:
        for row in rows:
            if set(row) != set(schema.names):
                odd = ", ".join(sorted(set(row) ^ set(schema.names)))
                raise ValueError(f"a row of {name} lacks or should not have: {odd}")
        table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema)
        note = json.dumps(dict(made_from), sort_keys=True)
        table = table.replace_schema_metadata({"pivottrace.made_from": note})
        write_table_atomic(self.path / name, table)

    def _read_table(self, name: str, made_from: Mapping[str, str], schema: pa.Schema) -> pa.Table:
        table = read_table(self.path / name)
        note = _note(table)
        for what, now in made_from.items():
            if note.get(what) != now:
                raise PivotTraceError(
                    f"{name} in {self.path} was made from {what} {note.get(what, 'unknown')}, "
                    f"but the run now has {what} {now}: make {name} again."
                )
        self._check_columns(name, table.schema, schema)
        return table

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


def _note(table: pa.Table) -> dict[str, Any]:
    """What a table says it was made from; nothing if it is not ours."""
    try:
        note = json.loads((table.schema.metadata or {}).get(b"pivottrace.made_from", b"{}"))
    except ValueError:
        return {}
    return note if isinstance(note, dict) else {}
