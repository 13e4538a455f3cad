"""Exported files are read by stock verl, our plugin switched off."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.pool import RunDir
from pivottrace_verl.training.data import export_for_verl, training_tables
from tests.score_table import score_row

READ = """
import json, sys
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn
from verl.utils.reward_score import default_compute_score

words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
config = OmegaConf.create({"cache_dir": sys.argv[2], "filter_overlong_prompts_workers": None})
out = {}
for name in ("train", "val"):
    data = RLHFDataset(f"{sys.argv[1]}/{name}.parquet", tokenizer, config)
    rows = [data[i] for i in range(len(data))]
    collate_fn(rows)
    out[name] = [
        {
            "index": row["index"],
            "prompt": row["raw_prompt"],
            "truth": row["reward_model"]["ground_truth"],
            "extra": row["extra_info"],
            "reward": default_compute_score(
                row["data_source"],
                "So #### " + row["reward_model"]["ground_truth"],
                row["reward_model"]["ground_truth"],
                row["extra_info"],
            ),
        }
        for row in rows
    ]
out["ours"] = sorted(m for m in sys.modules if m.startswith("pivottrace_verl.training"))
print("RESULT " + json.dumps(out))
"""


def make_run(path: Path) -> RunDir:
    """Six prompts of GSM8K's kind: two annotated and labelled, and one of each other route."""
    model = path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "w.safetensors").write_bytes(b"w")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {i} and one?"}],
            "data_source": "openai/gsm8k",
        }
        for i in range(6)
    ]
    for name in ("pool", "val"):
        lines = [{**row, "label": str(i + 1)} for i, row in enumerate(rows)]
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    run = RunDir.create(path / "run", path / "pool.jsonl", model, path / "val.jsonl")
    ids = [prompt.pt_id for prompt in run.pool()]
    run.write_score_part(0, [score_row(pt_id) for pt_id in ids])
    run.merge_scores()
    routes = ["drop", "annotate", "self_train", "review", "annotate", "drop"]
    run.write_plan(
        [
            {
                "pt_id": pt_id,
                "route": route,
                "uncertainty": i / 5,
                "rank": 6 - i,
                "reason": "",
                "cost": 1.0,
            }
            for i, (pt_id, route) in enumerate(zip(ids, routes, strict=True))
        ],
        {},
    )
    who = {"annotator": "ana", "source_file": "f", "purpose": "annotate"}
    run.ledger().append({"pt_id": ids[i], "label": str(i + 1), **who} for i in (1, 4))
    return run


def test_stock_verl_reads_rewards_and_collates_an_export_without_our_plugin(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    exported = export_for_verl(run, tmp_path / "out")
    assert (exported.labelled, exported.self_train, exported.validation) == (2, 0, 6)
    job = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "out"), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PIVOTTRACE_DISABLE": "1", "HF_HOME": str(tmp_path / "hf")},
    )
    assert job.returncode == 0, job.stderr
    line = next(line for line in job.stdout.splitlines() if line.startswith("RESULT "))
    read = json.loads(line.removeprefix("RESULT "))
    assert read["ours"] == []
    assert [row["truth"] for row in read["train"]] == ["2", "5"]
    assert [row["index"] for row in read["train"]] == [0, 1]
    assert [row["prompt"][0]["content"] for row in read["train"]] == [
        "What is 1 and one?",
        "What is 4 and one?",
    ]
    assert [row["extra"]["route"] for row in read["train"]] == ["annotate", "annotate"]
    assert [row["extra"]["uncertainty"] for row in read["train"]] == [0.2, 0.8]
    assert all(row["extra"]["labeled"] and row["reward"] == 1.0 for row in read["train"])
    assert len(read["val"]) == 6 and all(row["reward"] == 1.0 for row in read["val"])


def test_training_rows_that_do_not_fill_a_batch_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(PivotTraceError, match=r"Only 3 prompts are left .* one batch of 4"):
        training_tables(run, 4)
    assert [table.num_rows for table in training_tables(run, 3)] == [3, 6]
