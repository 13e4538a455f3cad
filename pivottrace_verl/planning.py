"""Stages that read a run directory, decide something and write it: triage and validation.

The decisions themselves are made in `triage` and `evaluation`; this is the plumbing between them
and the files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pivottrace_verl.annotation.formats import table_of
from pivottrace_verl.budget import read_costs
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.evaluation import evaluate
from pivottrace_verl.files import file_fingerprint, read_object, write_json_atomic
from pivottrace_verl.plan import ROUTES
from pivottrace_verl.pool import RunDir
from pivottrace_verl.prompts import render
from pivottrace_verl.triage import (
    Plan,
    TriageConfig,
    Uninformative,
    choose_probes,
    default_probes,
    outcomes,
    sound,
    triage,
    uncertainty,
)


def make_plan(
    run: RunDir, config: TriageConfig, *, fallback: bool = False, costs: Path | None = None
) -> tuple[Plan, dict[str, Any]]:
    """Triage the run's pool on its labelled probes; `costs` is a file of what labels cost.

    Returns the plan and what triage.json keeps beside the rows. If the probes refused the
    estimator and `fallback` took the one they recommend, `refused` is the sentence of the refusal,
    else None; without `fallback` the refusal is raised.
    """
    scores, ledger = run.scores(rollouts=False), run.ledger()
    wanted = set(run.probes()["pt_ids"])
    labels = ledger.labels()
    strangers = sorted(set(labels) - set(scores["pt_id"].to_pylist()))
    if strangers:
        raise PivotTraceError(
            f"{ledger.path} holds labels of {len(strangers)} prompts that are not in this pool "
            f"(first: '{strangers[0]}')."
        )
    missing = wanted - set(labels)
    if missing:
        raise PivotTraceError(
            f"{len(missing)} of {len(wanted)} probes have no label yet: run `pivottrace annotate "
            "export --what probes`, have the file filled, and import it."
        )
    probed = {pt_id: label for pt_id, label in labels.items() if pt_id in wanted}
    found = outcomes(scores, probed, run.manifest["answers"]["kind"])
    # The answers have been looked at; the rest of triage works on numbers.
    scores = scores.drop_columns(["answers", "majority"])
    budget: dict[str, Any] = {"spent": ledger.spent()}
    if config.quotas or config.floors:
        budget["sources"] = run.pool_table(["data_source"])["data_source"]
    if costs is not None:
        budget["costs"] = read_costs(costs, scores["pt_id"].combine_chunks())
    refused = None
    try:
        plan = triage(scores, found, set(labels), config, **budget)
    except Uninformative as refusal:
        if not fallback or refusal.best is None:
            raise
        refused = str(refusal)
        config = dataclasses.replace(config, estimator=refusal.best)
        plan = triage(scores, found, set(labels), config, **budget)
    return plan, {
        **plan.info(),
        "refused": refused,
        "costs": None
        if costs is None
        else {"file": costs.name, "fingerprint": file_fingerprint(costs)},
    }


def draw_probes(run: RunDir, estimator: str, n: int | None, seed: int) -> tuple[int, int]:
    """Choose the probes over the ranking by `estimator` and write probes.json.

    Prompts whose rollouts are broken are left out: their labels would say nothing of the ranking.
    Returns the numbers of probes and of prompts left out.
    """
    scores = run.scores(rollouts=False)
    judged = sound(scores, TriageConfig())
    u = uncertainty(scores.filter(pa.array(judged)), estimator)
    wanted, broken = n or default_probes(len(u)), int((~judged).sum())
    if broken and not 1 <= wanted <= len(u):
        raise PivotTraceError(
            f"{wanted or 'Some'} probes were asked for, but the rollouts of {broken} of "
            f"{len(judged)} prompts are mostly truncated, unparseable or timed out, which leaves "
            f"{len(u)} to choose from."
        )
    chosen = choose_probes(list(u.values()), list(u), wanted, seed)
    run.write_probes(estimator, seed, chosen)
    return len(chosen), broken


def list_route(run: RunDir, route: str, path: Path) -> int:
    """Write the prompts of one route to a .jsonl, .csv or .parquet file, most uncertain first, with
    why they are there and how their rollouts went; returns their number."""
    if route not in ROUTES:
        raise PivotTraceError(f"There is no route '{route}', only {', '.join(ROUTES)}.")
    table = table_of(path)
    _keep_others(table, path)
    plan = run.plan()
    kept = pc.equal(plan["route"], route)
    columns = plan.filter(kept)
    pool = run.pool_table(["prompt", "data_source"]).filter(kept)
    scores = run.scores(rollouts=False).filter(kept)
    counted = ("n_rollouts", "unparseable", "truncated", "timed_out", "majority")
    for name in counted:
        columns = columns.append_column(name, scores[name])
    columns = columns.append_column("data_source", pool["data_source"])
    columns = columns.append_column("prompt", pool["prompt"]).sort_by("rank")
    rows = [{**row, "prompt": render(row["prompt"])} for row in columns.to_pylist()]
    table.write(path, rows, columns.column_names)
    return len(rows)


def _keep_others(table: ModuleType, path: Path) -> None:
    """Refuse to replace a file that is no such list."""
    if not path.exists():
        return
    try:
        table.rows(path, ("pt_id", "route", "reason"))
    except PivotTraceError as error:
        raise PivotTraceError(
            f"{path} is there already and is no list of a route: export under another name."
        ) from error


def evaluate_run(
    run: RunDir,
    when: str,
    *,
    samples: int,
    seed: int,
    engine_options: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], bool]:
    """Validation accuracy `before` or `after` training, kept in validation.json.

    Returns the figures and whether they were computed now; an evaluation that was made with the
    same model and settings is not repeated.
    """
    if when not in ("before", "after"):
        raise PivotTraceError(f"Evaluate `before` or `after` training, not {when!r}.")
    validation = run.validation()
    if not validation:
        raise PivotTraceError(
            f"The run directory {run.path} has no validation prompts: `pivottrace init --val`."
        )
    settings = run.manifest.get("settings", {}).get("score")
    if settings is None:
        raise PivotTraceError(f"{run.path} is not scored yet: run `pivottrace score` first.")
    if when == "before":
        model = run.model_path()
    else:
        done = run.path / "train" / "done.json"
        if not done.exists():
            raise PivotTraceError(f"{run.path} is not trained yet: run `pivottrace train` first.")
        model = run.path / read_object(done)["checkpoint"]
    file = run.path / "validation.json"
    kept = read_object(file) if file.exists() else {}
    # The model's place and the file's time tell one checkpoint from a later one at the same place.
    made_from = {
        "model": str(model.resolve()),
        "written": (model / "config.json").stat().st_mtime,
        "val": run.stage_fingerprint("val"),
        "samples": samples,
        "seed": seed,
    }
    if when in kept and kept[when]["made_from"] == made_from:
        return kept[when], False
    result = evaluate(
        model,
        [prompt.messages for prompt, _ in validation],
        [label for _, label in validation],
        answers=run.manifest["answers"]["kind"],
        max_prompt_tokens=settings["score"]["max_prompt_tokens"],
        max_tokens=settings["score"]["max_tokens"],
        samples=samples,
        seed=seed,
        engine_options=engine_options,
    )
    kept[when] = {**result, "made_from": made_from}
    write_json_atomic(file, kept)
    return kept[when], True
