"""A chat model of a few thousand random weights, two parquet files and a reward function."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return {"score": float(len(set(solution_str)) % 2), "length": float(len(solution_str))}
"""
CHAT = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


@dataclass(frozen=True)
class TinyJob:
    """What `verl.trainer.main_ppo` needs to read."""

    model: Path
    train: Path
    val: Path
    reward: Path


def write_model(folder: Path) -> None:
    """A Llama of two layers with head_dim 32, the least that vLLM's CPU attention takes."""
    torch = pytest.importorskip("torch")
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    characters = ["<pad>", "<eos>", "<unk>", *"0123456789+=>"]
    words = {character: index for index, character in enumerate(characters)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    every = tokenizers.Regex(r"[\s\S]")
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(every, "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=CHAT,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


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
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder / "model")
    assert json.loads((folder / "model" / "config.json").read_text())["head_dim"] == 32
    write_rows(folder / "train.parquet", 16)
    write_rows(folder / "val.parquet", 4)
    (folder / "reward.py").write_text(REWARD)
    yield TinyJob(
        folder / "model", folder / "train.parquet", folder / "val.parquet", folder / "reward.py"
    )
