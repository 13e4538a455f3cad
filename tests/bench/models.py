"""Random Llamas with a tokenizer of whole words, for tests and benchmarks that need an engine.

Weights are random, shapes are real: what a step costs is that of the model whose shape it has.
Half of the words are numbers, so that most rollouts have an answer and few agree: comparing
answers costs more than it would on a trained model.
"""

from pathlib import Path
from typing import Any

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
CHAT = (
    "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}say{% endif %}"
)
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
    words = {word(i): i for i in range(size["vocab_size"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=CHAT,
    ).save_pretrained(folder)
    config = LlamaConfig(
        **size,
        max_position_embeddings=2048,
        # Wide enough that a rollout is not one word for ever, and attention not uniform.
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
