"""A small run directory, scored, probed and triaged, for tests that begin there."""

import json
from pathlib import Path

from pivottrace_verl.pool import RunDir
from pivottrace_verl.triage import TriageConfig, outcomes, triage
from tests.score_table import score_row

P, N = 40, 16
WHO = {"annotator": "ana", "source_file": "f"}


def make_run(path: Path, hidden: str = "41") -> RunDir:
    """A triaged pool whose first 16 prompts are probes; `hidden` stands in the incoming file where
    nobody may look."""
    model = path / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "w.safetensors").write_bytes(b"w")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"=What is {i} and one?"}],
            "data_source": "sums",
            "reward_model": {"ground_truth": hidden},
        }
        for i in range(P)
    ]
    (path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = RunDir.create(path / "run", path / "pool.jsonl", model, answers_kind="exact")
    ids = [prompt.pt_id for prompt in run.pool()]
    run.write_score_part(0, [score(i, ids[i]) for i in range(P)])
    run.merge_scores()
    run.write_probes("consistency", 0, ids[:N])
    labels = [{"pt_id": ids[i], "label": "1", "purpose": "probe", **WHO} for i in range(N)]
    run.ledger().append(labels)
    scores, ledger = run.scores(), run.ledger()
    config = TriageConfig(
        estimator="consistency", budget=N + 2, mastered=0.99, overflow="self_train"
    )
    plan = triage(scores, outcomes(scores, ledger.labels(), "exact"), set(ids[:N]), config)
    run.write_plan(plan.rows, plan.info())
    return run


def score(i: int, pt_id: str) -> dict:
    """Of 8 rollouts the fewer are right, the later the prompt among the probes or the others."""
    right = 8 - (i if i < N else i - N) * 8 // (N if i < N else P - N)
    uncertain = {"uncertainty/consistency": 1 - right / 8 + i / 1000}
    return score_row(pt_id, [("1", right), ("2", 8 - right)], **uncertain)


def trained(run: RunDir) -> list[str]:
    kept = [r for r in run.plan().to_pylist() if r["route"] in ("annotate", "self_train")]
    return [row["pt_id"] for row in kept]
