"""Stages that read a run directory, decide something and write it: triage and validation.

The decisions themselves are made in `triage` and `evaluation`; this is the plumbing between them
and the files.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.evaluation import evaluate
from pivottrace_verl.files import read_object, write_json_atomic
from pivottrace_verl.pool import RunDir
from pivottrace_verl.triage import Plan, TriageConfig, Uninformative, outcomes, triage


def make_plan(
    run: RunDir, config: TriageConfig, *, fallback: bool = False
) -> tuple[Plan, str | None]:
    """Triage the run's pool on its labelled probes.

    Returns the plan and, if the probes refused the estimator and `fallback` took the one they
    recommend, the sentence of the refusal. Without `fallback` the refusal is raised.
    """
    scores, ledger = run.scores(), run.ledger()
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
    try:
        return triage(scores, found, set(labels), config), None
    except Uninformative as refusal:
        if not fallback or refusal.best is None:
            raise
        config = dataclasses.replace(config, estimator=refusal.best)
        return triage(scores, found, set(labels), config), str(refusal)


def evaluate_run(run: RunDir, when: str, *, samples: int, seed: int) -> tuple[dict[str, Any], bool]:
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
    )
    kept[when] = {**result, "made_from": made_from}
    write_json_atomic(file, kept)
    return kept[when], True
