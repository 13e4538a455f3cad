"""A chat model of a few thousand random weights, two parquet files and a reward function."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.bench.models import write_model

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return {"score": float(len(set(solution_str)) % 2), "length": float(len(solution_str))}
"""


@dataclass(frozen=True)
class TinyJob:
    """What `verl.trainer.main_ppo` needs to read."""

    model: Path
    train: Path
    val: Path
    reward: Path


def write_rows(file: Path, count: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "prompt": [{"role": "user", "content": f"{i}+{i % 7}="}],
            "data_source": "sums",
            "reward_model": {"style": "rule", "ground_truth": str(i + i % 7)},
            "extra_info": {"index": i},
        }
        for i in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows), file)


@pytest.fixture(scope="session")
def tiny_job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyJob]:
    pytest.importorskip("torch")
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder / "model", "characters")
    assert json.loads((folder / "model" / "config.json").read_text())["head_dim"] == 32
    write_rows(folder / "train.parquet", 16)
    write_rows(folder / "val.parquet", 4)
    (folder / "reward.py").write_text(REWARD)
    yield TinyJob(
        folder / "model", folder / "train.parquet", folder / "val.parquet", folder / "reward.py"
    )
