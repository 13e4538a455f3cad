"""A multiprocess engine as verl runs it: AsyncLLM here, EngineCore and worker in spawned processes.

    python engine_async.py SCRATCH

The capture is installed through the entry point: by vLLM itself in the worker, and by the receiver
in this process, whose plugins were loaded before capture was asked for. Writes `runs.json` and
`traces.npz` like `engine_runs.py`.
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
    from vllm.plugins import load_general_plugins
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    directory = str(Path(scratch, "llama"))
    make_tiny_model(directory)
    load_general_plugins()
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
    requests, traces = {"rollouts": [], "children": [], "named": []}, {}

    async def rollout(scenario, prompt, name, n_tokens, n=1, seed=None):
        key = f"async/{scenario}/{name}"
        params = SamplingParams(
            n=n,
            temperature=1.0,
            seed=seed,
            max_tokens=n_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={"pivottrace": {"key": key}},
        )
        async for output in engine.generate({"prompt_token_ids": prompt}, params, request_id=name):
            sequences = [list(sequence.token_ids) for sequence in output.outputs]
        for i, tokens in enumerate(sequences):
            own = f"{key}/{i}" if i else key
            trace = await receiver.aget(own, timeout=10.0, n_tokens=len(tokens))
            requests[scenario].append({"key": own, "prompt": prompt, "tokens": tokens})
            if trace is not None:
                traces[f"{own}:stats"] = trace.stats
                traces[f"{own}:tokens"] = np.stack([trace.token_entropy, trace.self_certainty])

    await asyncio.gather(
        *(
            rollout("rollouts", prompt, f"{len(prompt)}/{seed}", 10 + 5 * seed, seed=seed)
            for prompt in prompts
            for seed in range(8)
        )
    )
    # A request of one rollout whose id looks as if it were a child of `ab`, beside children.
    await asyncio.gather(
        rollout("children", prompts[0], "ab", 10, n=4),
        rollout("children", prompts[1], "3_cd", 10, n=4, seed=0),
        rollout("named", prompts[1], "12_ab", 10),
    )
    engine.shutdown()
    receiver.close()
    facts = {"hello": hello, "counters": receiver.counters}
    runs = {"llama": {"requests": requests, "facts": facts}}
    Path(scratch, "runs.json").write_text(json.dumps(runs))
    np.savez(Path(scratch, "traces.npz"), **traces)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
