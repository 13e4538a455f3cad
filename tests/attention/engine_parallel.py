"""Engines with several workers, or with draft tokens: AsyncLLM here, everything else spawned.

    python engine_parallel.py SCRATCH KIND

KIND is one of `KINDS`. Writes `runs.json` and `traces.npz` like `engine_runs.py`.
"""

import asyncio
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch

from pivottrace_verl.attention.channel import Receiver, Trace
from pivottrace_verl.attention.config import ENV_DISABLE, CaptureConfig
from pivottrace_verl.attention.selftest import make_tiny_model

N_BLOCKS = 33
"""One block is vLLM's own: 32 x 32 tokens, too few for `crowded`."""

ACROSS = CaptureConfig(layers=(0, 3), head_groups=((0, 1, 2), (1,), (3, 0)), window=8, sink=2)
"""Groups that lie on both tensor ranks, on one, in any order; layers of both stages."""

KINDS = {
    "tensor": (ACROSS, {"tensor_parallel_size": 2}, {}),
    # One key head for two ranks: each keeps a copy. Each layer has heads of its own, all on rank 1
    # in one of them.
    "replicated": (
        CaptureConfig(layers=(2, 1), heads=((3, 2), (1, 0, 2))),
        {"tensor_parallel_size": 2},
        {"architecture": "qwen2", "n_key_heads": 1},
    ),
    "pipeline": (ACROSS, {"pipeline_parallel_size": 2}, {}),
    # The stage with the logits holds no traced layer.
    "first_stage": (CaptureConfig(layers=(1,)), {"pipeline_parallel_size": 2}, {}),
    "both": (ACROSS, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, {}),
    "data": (CaptureConfig(), {"data_parallel_size": 2}, {}),
    "drafts": (
        ACROSS,
        {
            "speculative_config": {
                "method": "ngram",
                "num_speculative_tokens": 3,
                "prompt_lookup_max": 3,
                "prompt_lookup_min": 1,
            }
        },
        {},
    ),
}
"""Capture, engine settings, model settings."""


def make_model(kind, directory):
    model = make_tiny_model(directory, **KINDS[kind][2])
    if kind == "drafts":
        # Where little depends on the context, text runs in circles, and drafts come true.
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight *= 0.002
        model.save_pretrained(directory)


class Run:
    """One engine and what it generated."""

    def __init__(self, kind, directory, receiver):
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.receiver = receiver
        self.requests, self.traces = {}, {}
        self.generator = torch.Generator().manual_seed(5)
        self.engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=directory,
                skip_tokenizer_init=True,
                dtype="float32",
                # vLLM 0.28 forgets a buffer of pipeline stages where it does not warm up.
                enforce_eager="pipeline_parallel_size" not in KINDS[kind][1],
                max_model_len=512,
                max_num_seqs=8,
                block_size=32,
                num_gpu_blocks_override=N_BLOCKS,
                enable_prefix_caching=True,
                enable_chunked_prefill=True,
                max_num_batched_tokens=64,
                **KINDS[kind][1],
            )
        )

    def prompt(self, length):
        return torch.randint(2, 384, (length,), generator=self.generator).tolist()

    async def stream(self, key, prompt, n_tokens, stop_at=None, asks=None, **sampling):
        """Tokens of one request, aborted when it has `stop_at`."""
        from vllm import SamplingParams

        values = {"temperature": 1.0, **sampling}
        params = SamplingParams(
            max_tokens=n_tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args={"pivottrace": {"key": key, **(asks or {})}},
            **values,
        )
        tokens = []
        request = self.engine.generate({"prompt_token_ids": prompt}, params, request_id=key)
        async for output in request:
            tokens = list(output.outputs[0].token_ids)
            if stop_at is not None and len(tokens) >= stop_at:
                await self.engine.abort(key)
        return tokens

    async def trace(self, key, n_tokens):
        return await self.receiver.aget(key, timeout=20.0, n_tokens=n_tokens)

    async def one(self, scenario, number, prompt, n_tokens, **sampling):
        key = f"{scenario}/{number}"
        tokens = await self.stream(key, prompt, n_tokens, **sampling)
        trace = await self.trace(key, len(tokens)) if self.receiver else None
        self.note(scenario, key, prompt, tokens, trace)

    def note(self, scenario, key, prompt, tokens, trace):
        self.requests.setdefault(scenario, []).append(
            {"key": key, "prompt": prompt, "tokens": tokens}
        )
        if trace is not None:
            self.traces[f"{key}:stats"] = trace.stats
            self.traces[f"{key}:tokens"] = np.stack([trace.token_entropy, trace.self_certainty])

    async def all_of(self, scenario, lengths, n_tokens, **sampling):
        prompts = [self.prompt(length) for length in lengths]
        await asyncio.gather(
            *(self.one(scenario, i, p, n_tokens, **sampling) for i, p in enumerate(prompts))
        )
        self.requests[scenario].sort(key=lambda request: request["key"])

    async def resumed(self, number, length):
        """Aborted in mid-flight, then continued on prompt and tokens so far as a request of its
        own, as partial rollouts are: one trace of two parts."""
        prompt, parts, tokens = self.prompt(length), [], []
        for leg, stop_at in enumerate((8 + number, None)):
            key = f"resumed/{number}/{leg}"
            asks = {"prompt_tokens": length} if leg else None
            more = await self.stream(key, prompt + tokens, 40 - len(tokens), stop_at, asks)
            parts.append(await self.trace(key, len(more)))
            tokens += more
        self.note("resumed", f"resumed/{number}/0", prompt, tokens, Trace.join(parts))
        assert 8 + number <= len(tokens) <= 40 + 3

    async def greedy(self):
        await self.all_of("greedy", (2, 17, 90), 30, temperature=0.0)

    async def run(self):
        await self.greedy()
        await self.all_of("sampled", (1, 5, 40, 150), 30)
        await self.all_of("loops", (2, 20, 40), 150, temperature=0.0)
        await asyncio.gather(*(self.resumed(i, n) for i, n in enumerate((3, 60, 100))))
        await self.all_of("crowded", (30, 40, 50, 60, 30, 40, 50, 60), 200)
        return metrics()


def metrics():
    from vllm.v1.metrics.reader import get_metrics_snapshot

    wanted = {
        "vllm:num_preemptions": "preemptions",
        "vllm:spec_decode_num_draft_tokens": "drafted",
        "vllm:spec_decode_num_accepted_tokens": "accepted",
    }
    facts = dict.fromkeys(wanted.values(), 0)
    for metric in get_metrics_snapshot():
        if metric.name in wanted:
            facts[wanted[metric.name]] += metric.value
    return facts


async def main(scratch, kind):
    config = KINDS[kind][0]
    directory = str(Path(scratch, "model"))
    make_model(kind, directory)
    receiver = Receiver(config)
    receiver.start()
    run = Run(kind, directory, receiver)
    hello = receiver.wait_ready(10.0, engines=KINDS[kind][1].get("data_parallel_size", 1))
    facts = await run.run()
    run.engine.shutdown()
    receiver.close()
    facts.update(
        hello=hello,
        workers=len(receiver._workers),
        counters=receiver.counters,
        held=list(receiver._held),
        config=config.to_dict(),
    )
    os.environ[ENV_DISABLE] = "1"
    off = Run(kind, directory, None)
    await off.greedy()
    off.engine.shutdown()
    result = {"requests": run.requests, "off": off.requests["greedy"], "facts": facts}
    Path(scratch, "runs.json").write_text(json.dumps({"run": result}))
    np.savez(Path(scratch, "traces.npz"), **run.traces)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
