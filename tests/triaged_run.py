"""A small run directory, scored, probed and triaged, for tests that begin there."""

import dataclasses
import json
from pathlib import Path

from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.pivots import DetectorConfig
from pivottrace_verl.pool import RunDir
from pivottrace_verl.triage import TriageConfig, outcomes, triage
from tests.score_table import score_row

P, N = 40, 16
WHO = {"annotator": "ana", "source_file": "f"}


def make_run(
    path: Path, hidden: str = "41", prompt: str = "=What is {i} and one?", n: int = P
) -> RunDir:
    """A triaged pool of `n` whose first 16 prompts are probes; `hidden` stands in the incoming file
    where nobody may look."""
    model = path / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "w.safetensors").write_bytes(b"w")
    rows = [
        {
            "prompt": [{"role": "user", "content": prompt.format(i=i)}],
            "data_source": "sums",
            "reward_model": {"ground_truth": hidden},
        }
        for i in range(n)
    ]
    (path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = RunDir.create(path / "run", path / "pool.jsonl", model, answers_kind="exact")
    ids = [prompt.pt_id for prompt in run.pool()]
    run.write_score_part(0, [score(i, ids[i], n=n) for i in range(n)])
    run.merge_scores()
    probe(run, dict.fromkeys(ids, "1"), "exact", N + 2)
    return run


def make_trainable_run(
    path: Path, policy: Path, data: Path, *, all_labelled: bool = False
) -> RunDir:
    """The quickstart's pool and policy, scored as above but not by rollouts, triaged and labelled:
    16 probes and 14 more of its prompts, or all of them. `pivottrace train` can train on it."""
    run = RunDir.create(
        path, data / "pool.jsonl", policy, data / "val.jsonl", answers_kind="expression"
    )
    lines = (data / "answers.jsonl").read_text().splitlines()
    labels = {row["pt_id"]: row["label"] for row in map(json.loads, lines)}
    ids = [prompt.pt_id for prompt in run.pool()]
    scored = [score(i, ids[i], labels[ids[i]], len(ids)) for i in range(len(ids))]
    run.write_score_part(0, scored)
    run.merge_scores()
    note_scoring(run)
    probe(run, labels, "expression", N + 14)
    if all_labelled:
        info = json.loads((run.path / "triage.json").read_text())
        run.write_plan([{**row, "route": "annotate"} for row in run.plan().to_pylist()], info)
    asked = {r["pt_id"] for r in run.plan().to_pylist() if r["route"] == "annotate"}
    asked -= set(run.ledger().labels())
    buy(run, {pt_id: labels[pt_id] for pt_id in ids if pt_id in asked}, "annotate")
    return run


def note_scoring(run: RunDir) -> None:
    """Enter into the manifest what `pivottrace score` leaves there for training."""
    detector = {**DetectorConfig().to_dict(), "tau": 0.05}
    limits = {"max_prompt_tokens": 64, "max_tokens": 128, "temperature": 1.0}
    capture = dataclasses.asdict(CaptureConfig())
    run.update_manifest(
        settings={"score": {"score": limits, "capture": capture}}, detector=detector
    )


def buy(run: RunDir, labels: dict[str, str], purpose: str) -> None:
    """Enter labels into the ledger."""
    run.ledger().append(
        {"pt_id": pt_id, "label": label, "purpose": purpose, **WHO}
        for pt_id, label in labels.items()
    )


def probe(run: RunDir, labels: dict[str, str], kind: str, budget: int) -> None:
    """Buy the probes' labels and triage."""
    probes = [prompt.pt_id for prompt in run.pool()][:N]
    run.write_probes("consistency", 0, probes)
    buy(run, {pt_id: labels[pt_id] for pt_id in probes}, "probe")
    scores, ledger = run.scores(), run.ledger()
    config = TriageConfig(
        estimator="consistency", budget=budget, mastered=0.99, overflow="self_train"
    )
    plan = triage(scores, outcomes(scores, ledger.labels(), kind), set(probes), config)
    run.write_plan(plan.rows, plan.info())


def score(i: int, pt_id: str, label: str = "1", n: int = P) -> dict:
    """Of 8 rollouts the fewer are right, the later the prompt among the probes or the others."""
    right = 8 - (i if i < N else i - N) * 8 // (N if i < N else n - N)
    uncertain = {"uncertainty/consistency": 1 - right / 8 + i / 1000}
    return score_row(pt_id, [(label, right), ("2", 8 - right)], **uncertain)


def trained(run: RunDir) -> list[str]:
    kept = [r for r in run.plan().to_pylist() if r["route"] in ("annotate", "self_train")]
    return [row["pt_id"] for row in kept]
