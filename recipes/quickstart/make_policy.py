"""Trains the quickstart's policy: a Llama of about a million parameters that searches, sometimes
carelessly, for countdown solutions.

    python recipes/quickstart/make_policy.py --out runs/policy [--seed 0] [--steps N] [--small]

Contract: the folder appears complete or not at all, in Hugging Face format (config, weights,
tokenizer with chat template, generation config), with `policy.json` saying what it was made from;
a folder made from the same sources and settings is left as it is. The number of steps is fixed,
so the same seed on the same machine and thread count gives the same model; `time_limit` is a guard
that stops a run on a very slow machine and says so in `policy.json`.

Axes: B sequences of a batch, T tokens.
"""

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import permutations
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent))
import muon
import tasks

SPECIAL = ("<pad>", "<|end|>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>")
TAGS = ("<answer>", "</answer>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
WORDS = (
    *("+", "-", "*", "/", "=", "(", ")", ",", ".", ":", "yes", "no", "back", "guess"),
    *("Calculate", "using", "all", "of", "these", "numbers", "Answer", "in"),
)


@dataclass(frozen=True)
class Settings:
    """Everything the policy depends on besides the sources."""

    seed: int = 0
    fact_steps: int = 200
    """Steps on sums, differences, products and quotients alone."""
    steps: int = 1600
    """Steps on worked solutions, after the facts."""
    careless_steps: int = 250
    """The last of these, on careless demonstrations; those before are careful ones. Arithmetic and
    search are learnt in half the time from clean examples; the bad habits come on top, where
    reinforcement learning can take them off again."""
    batch: int = 24
    learning_rate: float = 1e-2
    embedding_rate: float = 5e-3
    problems: int = 3000
    hidden: int = 128
    layers: int = 4
    intermediate: int = 384
    time_limit: float = 900.0


SMALL = {
    "fact_steps": 100,
    "steps": 320,
    "problems": 1000,
    "hidden": 64,
    "layers": 4,
    "intermediate": 192,
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Words and whole numbers as single tokens; whitespace carries nothing."""
    vocabulary = [*SPECIAL, *TAGS, *WORDS, *(str(n) for n in range(tasks.MAX_NUMBER + 1))]
    size = 64 * math.ceil(len(vocabulary) / 64)
    vocabulary += [f"<unused{i}>" for i in range(size - len(vocabulary))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"\d+|[A-Za-z]+|[^\sA-Za-z\d]"), behavior="removed", invert=True
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in TAGS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|end|>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_model(s: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with heads of 32 dimensions, the smallest that vLLM's CPU attention takes."""
    heads = max(2, s.hidden // 32)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=s.hidden,
            intermediate_size=s.intermediate,
            num_hidden_layers=s.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="sdpa",
        )
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = None
    return model


def number_features() -> torch.Tensor:
    """[MAX_NUMBER + 1, F]: cosines and sines of the numbers and of their logarithms.

    Sums are rotations in the first and products in the second, so that a network that starts with
    these embeddings learns arithmetic in a fraction of the steps it needs from random ones.
    """
    n = torch.arange(tasks.MAX_NUMBER + 1.0)
    waves = [n / p for p in (2, 3, 4, 5, 7, 10, 11, 13, 20, 25, 30, 40, 50, 70, 100, 200, 400)]
    waves += [torch.log1p(n) / p for p in (0.5, 1, 2, 4, 8)]
    angles = 2 * math.pi * torch.stack(waves, dim=1)
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)


@torch.no_grad()
def place_numbers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Embed the numbers by their features, in a random rotation, at twice the usual scale."""
    weight = model.model.embed_tokens.weight
    features = number_features()
    rotation = torch.linalg.qr(
        torch.randn(max(weight.shape[1], features.shape[1]), weight.shape[1])
    )[0]
    rows = features @ rotation[: features.shape[1]]
    index = tokenizer.get_vocab()
    ids = [index[str(n)] for n in range(tasks.MAX_NUMBER + 1)]
    weight[ids] = rows / rows.std() * 2 * model.config.initializer_range


def prompt_tokens(tokenizer: PreTrainedTokenizerFast, problem: tasks.Instance) -> list[int]:
    """What the policy is given before it answers."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": problem.prompt}], add_generation_prompt=True, tokenize=False
    )
    return list(tokenizer(text).input_ids)


def fact_batches(
    s: Settings, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless rows of ten sums, differences, products and quotients; only results are targets."""
    rng = random.Random(s.seed)
    index = tokenizer.get_vocab()
    while True:
        rows = []
        for _ in range(s.batch):
            words: list[str] = []
            for _ in range(10):
                first = rng.choice(tasks.steps(*(rng.randint(1, tasks.MAX_VALUE) for _ in "ab")))
                second = rng.choice(tasks.steps(first.value, rng.randint(1, tasks.MAX_VALUE)))
                words += [*str(rng.choice((first, second))).split(), ","]
            rows.append([index[w] for w in words])
        tokens = torch.tensor(rows)
        targets = torch.full_like(tokens, -100)
        targets[:, 3::6] = tokens[:, 4::6]
        yield tokens, targets


def batches(
    s: Settings, tokenizer: PreTrainedTokenizerFast, carelessness: tasks.Carelessness, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (tokens [B, T], targets [B, T]); -100 marks prompt and padding in the targets.

    Every demonstration is written anew; sequences of similar length share a batch.
    """
    rng = random.Random(seed)
    problems = tasks.draw(s.problems, seed=s.seed, for_training=True)
    # The same problem with its numbers in every order: one prompt each.
    orders = [
        [replace(p, numbers=order) for order in sorted(set(permutations(p.numbers)))]
        for p in problems
    ]
    prompts = {p: prompt_tokens(tokenizer, p) for group in orders for p in group}
    index = tokenizer.get_vocab()
    while True:
        chunk = []
        for _ in range(16 * s.batch):
            problem = rng.choice(rng.choice(orders))
            text = tasks.worked_solution(problem, rng, carelessness)
            answer = [index[word] for word in text.split()] + [tokenizer.eos_token_id]
            chunk.append((prompts[problem], answer))
        chunk.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        rows = [chunk[k : k + s.batch] for k in range(0, len(chunk), s.batch)]
        rng.shuffle(rows)
        for row in rows:
            width = max(len(p) + len(a) for p, a in row)
            tokens = torch.full((s.batch, width), tokenizer.pad_token_id)
            targets = torch.full((s.batch, width), -100)
            for b, (p, a) in enumerate(row):
                tokens[b, : len(p) + len(a)] = torch.tensor(p + a)
                targets[b, len(p) - 1 : len(p) + len(a) - 1] = torch.tensor(a)
            yield tokens, targets


def train(s: Settings, tokenizer: PreTrainedTokenizerFast) -> tuple[LlamaForCausalLM, dict]:
    """The trained model and what to report of the training."""
    torch.manual_seed(s.seed)
    start = time.monotonic()
    model = build_model(s, tokenizer)
    place_numbers(model, tokenizer)
    matrices = [p for n, p in model.model.layers.named_parameters() if p.ndim == 2]
    others = [model.model.embed_tokens.weight, *(p for p in model.parameters() if p.ndim == 1)]
    muon_optimizer = muon.Muon(matrices)
    optimizer = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0)
    steps = s.fact_steps + s.steps
    warmup = max(1, min(40, steps // 10))
    done, average = 0, float("nan")
    careless = tasks.Carelessness()
    phases = (
        (s.fact_steps, fact_batches(s, tokenizer)),
        (
            s.fact_steps + s.steps - s.careless_steps,
            batches(s, tokenizer, tasks.careful(careless), s.seed),
        ),
        (steps, batches(s, tokenizer, careless, s.seed + 1)),
    )
    for done in range(1, steps + 1):
        progress = max(0, done - warmup) / max(1, steps - warmup)
        scale = min(done / warmup, 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = s.embedding_rate * scale
        tokens, targets = next(next(rows for end, rows in phases if done <= end))
        # Right padding under a causal mask: no real token sees a pad, so no mask is needed.
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        wanted = targets != -100
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]), targets[wanted])
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        optimizer.step()
        muon_optimizer.step(s.learning_rate * scale)
        fresh = done == 1 or any(done == end + 1 for end, _ in phases)
        average = loss.item() if fresh else 0.95 * average + 0.05 * loss.item()
        if done % max(1, steps // 20) == 0 or done == steps:
            elapsed = time.monotonic() - start
            print(f"step {done}/{steps}  loss {average:.3f}  {elapsed:.0f} s", flush=True)
        if time.monotonic() - start > s.time_limit:
            print(f"stopped after {done} of {steps} steps: {s.time_limit:.0f} s are over")
            break
    report = {
        "steps_done": done,
        "final_loss": round(average, 4),
        "seconds": round(time.monotonic() - start, 1),
        "stopped_by_time_limit": done < steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": torch.get_num_threads(),
    }
    return model, report


def fingerprint(s: Settings) -> str:
    """SHA-256 over the settings and the sources that shape the policy."""
    digest = hashlib.sha256(json.dumps(asdict(s), sort_keys=True).encode())
    for source in (Path(__file__), Path(tasks.__file__), Path(muon.__file__)):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def make(out: Path, s: Settings) -> dict:
    """The policy in `out`, trained now or found there; returns what `policy.json` holds."""
    wanted = fingerprint(s)
    record = out / "policy.json"
    if record.exists():
        found: dict = json.loads(record.read_text())
        if found.get("fingerprint") == wanted:
            print(f"{out} already holds this policy")
            return found
    tokenizer = build_tokenizer()
    model, report = train(s, tokenizer)
    made = {"fingerprint": wanted, "settings": asdict(s), **report}
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / "policy.json").write_text(json.dumps(made, indent=1) + "\n")
    if out.exists():
        old = out.with_name(f".{out.name}.{os.getpid()}.old")
        out.rename(old)
        temporary.rename(out)
        shutil.rmtree(old)
    else:
        temporary.rename(out)
    print(f"wrote {out}: {report['parameters']} parameters, {report['seconds']} s")
    return made


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the quickstart's policy model.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="training steps (default: as tuned)")
    parser.add_argument("--small", action="store_true", help="a weaker one in under a minute")
    args = parser.parse_args(argv)
    # Matrices this small gain little from a second thread, and threads that wait for each other on
    # a busy machine cost many times what they bring.
    torch.set_num_threads(1)
    settings = Settings(seed=args.seed, **(SMALL if args.small else {}))
    if args.steps is not None:
        settings = replace(settings, steps=args.steps)
    make(args.out, settings)


if __name__ == "__main__":
    main()
