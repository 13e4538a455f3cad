"""Teaches the quickstart's policy countdown with two numbers, until it masters that.

    python recipes/grpo_cpu/teach.py --policy runs/quickstart/policy --out runs/grpo_cpu/policy

Every third batch is of the quickstart's careless demonstrations with three numbers, so that the
policy stays what it was there. Contract: the folder appears complete or not at all, in Hugging Face
format; one that is there is left as it is. The number of steps is fixed.

Axes: B sequences of a batch, T tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))
import make_policy
import pairs
import tasks

STEPS = 600
PAIRS = 64
"""Problems with two numbers in a batch; they are a third as long as those with three."""
LEARNING_RATE = 1e-3


def pair_batches(
    tokenizer: PreTrainedTokenizerFast, batch: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (tokens [B, T], targets [B, T]); -100 marks prompt and padding in the targets."""
    rng = random.Random(seed)
    problems = pairs.problems(seed)
    index = tokenizer.get_vocab()
    while True:
        rows = []
        for problem in rng.choices(problems, k=batch):
            shown = replace(problem, numbers=(*rng.sample(problem.numbers, 2),))
            words = pairs.worked_solution(shown).split()
            answer = [index[word] for word in words] + [tokenizer.eos_token_id]
            rows.append((make_policy.prompt_tokens(tokenizer, shown), answer))
        # One length: every prompt and every solution has as many tokens as the next.
        tokens = torch.tensor([prompt + answer for prompt, answer in rows])
        targets = torch.full_like(tokens, -100)
        first = len(rows[0][0]) - 1
        targets[:, first:-1] = tokens[:, first + 1 :]
        yield tokens, targets


def teach(policy: Path, steps: int) -> tuple[Any, PreTrainedTokenizerFast, dict[str, float]]:
    """The policy after `steps` steps, its tokenizer, and the mean losses of the last tenth."""
    settings = make_policy.Settings()
    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(policy)
    model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    sources = {
        "two": pair_batches(tokenizer, PAIRS, settings.seed),
        "three": make_policy.batches(settings, tokenizer, tasks.Carelessness(), settings.seed + 2),
    }
    losses: dict[str, list[float]] = {name: [] for name in sources}
    for step in range(steps):
        # The policy is trained already: warm up, or the first steps undo a part of it.
        scale = min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * scale
        name = ("two", "two", "three")[step % 3]
        tokens, targets = next(sources[name])
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        wanted = targets != -100
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]), targets[wanted])
        model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses[name].append(loss.item())
    last = max(1, steps // 30)
    return model, tokenizer, {name: sum(v[-last:]) / last for name, v in losses.items()}


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", type=Path, required=True, help="the quickstart's")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args(argv)
    out: Path = args.out
    if out.exists():
        print(f"{out} is there already")
        return
    # As in make_policy.py: a second thread brings little here and can cost much.
    torch.set_num_threads(1)
    model, tokenizer, losses = teach(args.policy, args.steps)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    made = {"steps": args.steps, "losses": {k: round(v, 4) for k, v in losses.items()}}
    (temporary / "taught.json").write_text(json.dumps(made, indent=1) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)
    print(f"wrote {out}: final losses {made['losses']}")


if __name__ == "__main__":
    main()
