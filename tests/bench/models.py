"""Random Llamas, for tests and benchmarks that need an engine.

Weights are random, shapes are real: what a step costs is that of the model whose shape it has.
The tokenizer has whole words, half of them numbers, so that most rollouts have an answer and few
agree: comparing answers costs more than it would on a trained model. That of `characters` takes
one character for a token.
"""

from pathlib import Path
from typing import Any

CHARACTERS = ("<pad>", "<eos>", "<unk>", *"0123456789+=>")
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,  # the least that vLLM's attention on a CPU takes
    },
    # The smallest that verl can train.
    "characters": {
        "vocab_size": len(CHARACTERS),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 128,
        "initializer_range": 0.02,
    },
    # HuggingFaceTB/SmolLM2-135M
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    },
}
_CHAT = (
    "{%% for message in messages %%}{{ message['content'] }}%s{%% endfor %%}"
    "{%% if add_generation_prompt %%}%s{%% endif %%}"
)
CHATS = {"words": _CHAT % (" ", "say"), "characters": _CHAT % ("", ">")}
WORDS = ("<pad>", "<eos>", "<unk>", "say", "=", "+", "so", "wait")


def word(index: int) -> str:
    """The word of a token: a few of `WORDS`, then numbers and letters in turn."""
    if index < len(WORDS):
        return WORDS[index]
    return str(index) if index % 2 else f"w{index}"


def write_model(folder: Path, shape: str = "tiny", seed: int = 0) -> None:
    """Write a Hugging Face model folder of one of `SHAPES`."""
    import tokenizers
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    size = SHAPES[shape]
    split = "characters" if shape == "characters" else "words"
    named = CHARACTERS if split == "characters" else map(word, range(size["vocab_size"]))
    words = {text: i for i, text in enumerate(named)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if split == "characters":
        every = tokenizers.Regex(r"[\s\S]")
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(every, "isolated")
        tokenizer.decoder = tokenizers.decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=CHATS[split],
    ).save_pretrained(folder)
    config = LlamaConfig(
        # A range wide enough that a rollout is not one word for ever, and attention not uniform.
        **{"max_position_embeddings": 2048, "initializer_range": 0.08, **size},
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
