"""A multiprocess engine as verl runs it: AsyncLLM here, EngineCore and worker in spawned processes.

    python engine_async.py SCRATCH

The capture is installed in the worker by vLLM itself, through the entry point. Writes `runs.json`
and `traces.npz` like `engine_runs.py`.
"""

import asyncio
import json
import sys
from pathlib import Path

import numpy as np
import torch

from pivottrace_verl.attention.channel import Receiver
from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.attention.selftest import make_tiny_model


async def main(scratch):
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    directory = str(Path(scratch, "llama"))
    make_tiny_model(directory)
    receiver = Receiver(CaptureConfig())
    receiver.start()
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=directory,
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            max_model_len=256,
            max_num_seqs=16,
            enable_chunked_prefill=False,
            max_num_batched_tokens=512,
        )
    )
    hello = receiver.wait_ready(5.0)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(2, 384, (n,), generator=generator).tolist() for n in (30, 100)]
    requests, traces = [], {}

    async def rollout(prompt, seed):
        key = f"async/{len(prompt)}/{seed}"
        params = SamplingParams(
            temperature=1.0,
            seed=seed,
            max_tokens=10 + 5 * seed,
            ignore_eos=True,
            detokenize=False,
            extra_args={"pivottrace": {"key": key}},
        )
        async for output in engine.generate({"prompt_token_ids": prompt}, params, request_id=key):
            tokens = list(output.outputs[0].token_ids)
        trace = await receiver.aget(key, timeout=10.0, n_tokens=len(tokens))
        requests.append({"key": key, "prompt": prompt, "tokens": tokens})
        if trace is not None:
            traces[f"{key}:stats"] = trace.stats
            traces[f"{key}:tokens"] = np.stack([trace.token_entropy, trace.self_certainty])

    await asyncio.gather(*(rollout(prompt, seed) for prompt in prompts for seed in range(8)))
    engine.shutdown()
    receiver.close()
    facts = {"hello": hello, "counters": receiver.counters}
    runs = {"llama": {"requests": {"rollouts": requests}, "facts": facts}}
    Path(scratch, "runs.json").write_text(json.dumps(runs))
    np.savez(Path(scratch, "traces.npz"), **traces)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
