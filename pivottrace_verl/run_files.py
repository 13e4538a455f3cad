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
    read_json,
    read_table,
    write_json_atomic,
    write_table_atomic,
)
from pivottrace_verl.ledger import Ledger
from pivottrace_verl.schemas import PLAN_SCHEMA, SCORE_SCHEMA


class RunFiles:
    """The stage files under one path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    # Manifest

    @property
    def manifest(self) -> dict[str, Any]:
        """manifest.json, read anew each time."""
        manifest = read_json(self.path / "manifest.json")
        if not isinstance(manifest, dict):
            raise PivotTraceError(f"{self.path / 'manifest.json'} is not a run's manifest.")
        return manifest

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
        return {int(p.stem.split("-")[1]) for p in (self.path / "scores").glob("part-*.parquet")}

    def check_score_parts(self) -> None:
        """PivotTraceError if a finished part lacks a column, or was made from something else."""
        made_from = self._made_from()
        for i in sorted(self.finished_parts()):
            self._read_scores(f"scores/part-{i:05d}.parquet", made_from)

    def merge_scores(self) -> None:
        """All parts -> scores.parquet, in the pool's order. PivotTraceError unless every prompt
        of the pool is there exactly once."""
        made_from = self._made_from()
        rows: dict[str, dict[str, Any]] = {}
        for i in sorted(self.finished_parts()):
            name = f"scores/part-{i:05d}.parquet"
            for row in self._read_scores(name, made_from).to_pylist():
                if row["pt_id"] in rows:
                    raise PivotTraceError(
                        f"Prompt {row['pt_id']} is scored twice, the second time in {name}."
                    )
                rows[row["pt_id"]] = row
        pool = self._read_table("pool.parquet", {"pool": made_from["pool"]})
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
        return self._read_scores("scores.parquet", self._made_from())

    def _read_scores(self, name: str, made_from: Mapping[str, str]) -> pa.Table:
        table = self._read_table(name, made_from)
        missing = [column for column in SCORE_SCHEMA.names if column not in table.column_names]
        if missing:
            raise PivotTraceError(
                f"{name} in {self.path} is of another version: it lacks {', '.join(missing)}; make "
                f"{name} again."
            )
        return table

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
        probes: dict[str, Any] = read_json(self._need("probes.json", "probes"))
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
        info = {**info, "made_from": {**made_from, "probe_labels": probes}}
        write_json_atomic(self.path / "triage.json", info)
        self._write_table("plan.parquet", rows, PLAN_SCHEMA, made_from)

    def plan(self) -> pa.Table:
        """One row a prompt, in the pool's order; PivotTraceError if the scores have changed."""
        self._need("plan.parquet", "plan")
        return self._read_table("plan.parquet", {"scores": self.stage_fingerprint("scores")})

    def triage(self) -> dict[str, Any]:
        """triage.json."""
        info: dict[str, Any] = read_json(self._need("triage.json", "plan"))
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

    def _read_table(self, name: str, made_from: Mapping[str, str]) -> pa.Table:
        table = read_table(self.path / name)
        note = json.loads((table.schema.metadata or {}).get(b"pivottrace.made_from", b"{}"))
        for what, now in made_from.items():
            if note.get(what) != now:
                raise PivotTraceError(
                    f"{name} in {self.path} was made from the {what} {note.get(what, 'unknown')}, "
                    f"but the {what} is now {now}: make {name} again."
                )
        return table
