"""The run directory: the pool and everything that is learnt about it.

Contract: RUN/ holds manifest.json, pool.parquet, val.parquet, scores/, scores.parquet,
ledger.jsonl, probes.json, plan.parquet, triage.json and what the later stages add. Every write is
atomic. Every file names the fingerprint of what it was made from, and a mismatch is refused with
both sides named. No answer of the incoming pool reaches this directory except through the ledger.

    run = RunDir.create("runs/a", "pool.parquet", "models/m", answers_kind="expression")
    with run.lock():
        run.write_score_part(0, rows); run.merge_scores()

Axes: P prompts, G rollouts of a prompt.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from pivottrace_verl.answers import get_answers
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.files import (
    fingerprint,
    model_fingerprint,
    os_reason,
    remove_leftovers,
    write_json_atomic,
    write_table_atomic,
)
from pivottrace_verl.ledger import Ledger
from pivottrace_verl.prompts import Prompt, read_pool, read_validation
from pivottrace_verl.run_files import RunFiles
from pivottrace_verl.schemas import POOL_SCHEMA, VAL_SCHEMA

__all__ = ["Ledger", "Prompt", "RunDir", "write_json_atomic", "write_table_atomic"]

Path_ = str | os.PathLike[str]

_SECTIONS = {
    "pool": {"fingerprint", "n_prompts", "source"},
    "model": {"fingerprint", "path"},
    "answers": {"kind"},
}
"""What every manifest holds."""

_OTHER = {
    "pool": "another pool",
    "model": "another model",
    "answers": "another answers kind",
    "val": "other validation data",
}


class RunDir(RunFiles):
    """One run directory. Make it with `create`, come back to it with `open`."""

    @classmethod
    def create(
        cls,
        path: Path_,
        pool_file: Path_,
        model_path: Path_,
        val_file: Path_ | None = None,
        answers_kind: str = "math",
    ) -> "RunDir":
        """A new run directory, or the existing one if it is of the same pool, model, validation
        data and answers kind.

        Raises PivotTraceError if an input is bad (nothing is written then) or if the existing
        directory was made from something else.
        """
        run = cls(Path(path))
        get_answers(answers_kind)
        source, model = Path(pool_file), Path(model_path)
        pool = read_pool(source)
        val, val_merged = read_validation(Path(val_file)) if val_file is not None else ([], 0)
        ids = [prompt.pt_id for prompt in pool.prompts]
        manifest: dict[str, Any] = {
            "format": 1,
            "pool": {
                "fingerprint": fingerprint(ids),
                "n_prompts": len(ids),
                "duplicates_merged": pool.duplicates,
                "source": str(source.resolve()),
            },
            "model": {"path": str(model.resolve()), "fingerprint": model_fingerprint(model)},
            "answers": {"kind": answers_kind},
        }
        if val_file is not None:
            manifest["val"] = {
                "fingerprint": fingerprint([[p.pt_id, label] for p, label in val]),
                "n_prompts": len(val),
                "duplicates_merged": val_merged,
                "source": str(Path(val_file).resolve()),
                "also_in_pool": len({p.pt_id for p, _ in val} & set(ids)),
            }
        if (run.path / "manifest.json").exists():
            run._check_same(manifest)
            return run
        try:
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PivotTraceError(
                f"The run directory {run.path} cannot be made: {os_reason(error)}."
            ) from error
        with run.lock():
            if (run.path / "manifest.json").exists():
                run._check_same(manifest)
                return run
            rows = [
                _prompt_row(p, {"index": i}) for p, i in zip(pool.prompts, pool.rows, strict=True)
            ]
            table = pa.Table.from_pylist(rows, schema=POOL_SCHEMA)
            run._write_table("pool.parquet", table, {"pool": fingerprint(ids)})
            if val_file is not None:
                rows = [_prompt_row(p, {"index": i}, label) for i, (p, label) in enumerate(val)]
                made_from = {"val": manifest["val"]["fingerprint"]}
                table = pa.Table.from_pylist(rows, schema=VAL_SCHEMA)
                run._write_table("val.parquet", table, made_from)
            # Last: a directory without a manifest is not a run yet, and is made again.
            write_json_atomic(run.path / "manifest.json", manifest)
        return run

    @classmethod
    def open(cls, path: Path_) -> "RunDir":
        """An existing run directory. PivotTraceError if there is none."""
        run = cls(Path(path))
        if not (run.path / "manifest.json").exists():
            raise PivotTraceError(
                f"{run.path} is not a run directory: it has no manifest.json; "
                "`pivottrace init` makes one."
            )
        manifest = run.manifest
        if manifest.get("format") != 1:
            raise PivotTraceError(
                f"{run.path} has format {manifest.get('format')}, but this version reads format 1."
            )
        for what, keys in _SECTIONS.items():
            section = manifest.get(what)
            if not isinstance(section, dict) or not keys <= set(section):
                raise PivotTraceError(
                    f"{run.path / 'manifest.json'} has no {what} with {', '.join(sorted(keys))}: "
                    "it was changed, or made by another program."
                )
        for what in ("detector", "settings", "timings"):
            if not isinstance(manifest.get(what, {}), dict):
                raise PivotTraceError(
                    f"{run.path / 'manifest.json'} has a {what} that is no object: it was changed, "
                    "or made by another program."
                )
        return run

    def model_path(self) -> Path:
        """The policy's folder; PivotTraceError if it is no longer the model of this run."""
        model = self.manifest["model"]
        now = model_fingerprint(Path(model["path"]))
        if now != model["fingerprint"]:
            raise PivotTraceError(
                f"The run directory {self.path} was made from the model {model['path']} "
                f"({model['fingerprint']}), but that folder now holds {now}."
            )
        return Path(model["path"])

    def _check_same(self, new: dict[str, Any]) -> None:
        """Refuse to go on in a directory that was made from other things."""
        old = RunDir.open(self.path).manifest
        for what, key, name in (
            ("pool", "fingerprint", "source"),
            ("model", "fingerprint", "path"),
            ("answers", "kind", "kind"),
            ("val", "fingerprint", "source"),
        ):
            before, now = old.get(what), new.get(what)
            if what == "val" and now is None:
                continue
            if before is None or (now is not None and before[key] != now[key]):
                raise PivotTraceError(
                    f"The run directory {self.path} was made from {_OTHER[what]}: "
                    f"{_side(before, key, name)} there, {_side(now, key, name)} here."
                )

    @contextmanager
    def lock(self, room: str = "", wait: float = 0.0) -> Iterator[int]:
        """Hold the run directory, or only a folder of it, as training does while labels come in;
        PivotTraceError if another process does, and still does after `wait` seconds. A child
        process that inherits the descriptor holds it, too, until it ends."""
        path = self.path / room / ".lock"
        try:
            path.parent.mkdir(exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise PivotTraceError(
                f"The run directory {self.path} cannot be locked: {os_reason(error)}."
            ) from error
        try:
            deadline = time.monotonic() + wait
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() < deadline:
                        time.sleep(0.1)
                        continue
                    holder = os.pread(file, 32, 0).decode(errors="replace").strip() or "unknown"
                    raise PivotTraceError(
                        f"Another process (pid {holder}) is working on the run directory "
                        f"{path.parent}."
                    ) from error
            os.ftruncate(file, 0)
            os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
            for folder in (self.path, *map(self.path.joinpath, ("scores", "traces", "train"))):
                remove_leftovers(folder)
            yield file
        finally:
            os.close(file)

    # Prompts

    def pool(self) -> list[Prompt]:
        """[P] the distinct prompts, in the pool's order."""
        return [_to_prompt(row) for row in self.pool_table().to_pylist()]

    def validation_table(self) -> pa.Table:
        """Columns of `VAL_SCHEMA`; no rows if the run has no validation data."""
        if "val" not in self.manifest:
            return VAL_SCHEMA.empty_table()
        return self._read_table("val.parquet", {"val": self.stage_fingerprint("val")}, VAL_SCHEMA)

    def validation(self) -> list[tuple[Prompt, str]]:
        """(prompt, label) of the validation data; empty if the run has none."""
        return [(_to_prompt(row), row["label"]) for row in self.validation_table().to_pylist()]


def _prompt_row(prompt: Prompt, extra: dict[str, Any], label: str | None = None) -> dict[str, Any]:
    row = {
        "pt_id": prompt.pt_id,
        "prompt": prompt.messages,
        "data_source": prompt.data_source,
        "extra_info": json.dumps(extra),
    }
    return row if label is None else {**row, "label": label}


def _to_prompt(row: Mapping[str, Any]) -> Prompt:
    return Prompt(row["pt_id"], row["prompt"], row["data_source"])


def _side(section: Mapping[str, Any] | None, key: str, name: str) -> str:
    if section is None:
        return "none"
    return f"{section[name]}" if key == name else f"{section[name]} ({section[key]})"
