"""One workload in real vLLM engines of one model; started as a process of its own.

    python engine_models.py SCRATCH MODEL DTYPE

64 requests at once, two thirds of which ask for their trace: prompts that share a prefix, prefilled
in chunks, a KV cache too small for all of them, four children of one prompt, two requests aborted
in mid-flight. All layers are captured, those with a sliding window too. Then the same again in an
engine without capture. Writes the model, `runs.json` and `traces.npz` into SCRATCH.
"""

import gc
import json
import sys
from pathlib import Path

import numpy as np
import torch
from engine_runs import close
from vllm import LLM, SamplingParams

from pivottrace_verl.attention import vllm_hooks
from pivottrace_verl.attention.channel import Receiver
from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.attention.selftest import make_tiny_model

CONFIG = CaptureConfig(layers=(0, 1, 2, 3), head_groups=((0, 1), (3,)))
N_REQUESTS, N_TOKENS, CHILDREN_OF, ABORTED = 64, 60, 60, (7, 21)
BLOCK, BUDGET = 32, 64
N_BLOCKS = 65
"""64 x 32 tokens: about a third of what 64 requests need."""


def make_prompts():
    generator = torch.Generator().manual_seed(3)

    def draw(n):
        return torch.randint(2, 384, (n,), generator=generator).tolist()

    shared = draw(96)
    lengths = torch.randint(1, 90, (N_REQUESTS,), generator=generator).tolist()
    return [shared[: 96 * (i % 3 == 0)] + draw(n) for i, n in enumerate(lengths)]


class Workload:
    """The engine and what came out of it."""

    def __init__(self, directory, dtype):
        self.llm = LLM(
            directory,
            skip_tokenizer_init=True,
            dtype=dtype,
            enforce_eager=True,
            block_size=BLOCK,
            max_model_len=256,
            max_num_seqs=N_REQUESTS,
            max_num_batched_tokens=BUDGET,
            num_gpu_blocks_override=N_BLOCKS,
            enable_prefix_caching=True,
            disable_hybrid_kv_cache_manager=True,
        )

    def run(self):
        """Tokens of each request by its key, children too."""
        engine, seen = self.llm.llm_engine, {}
        for i, prompt in enumerate(make_prompts()):
            children = i == CHILDREN_OF
            params = SamplingParams(
                n=4 if children else 1,
                temperature=float(children),
                max_tokens=N_TOKENS,
                ignore_eos=True,
                detokenize=False,
                extra_args={"pivottrace": {"key": str(i)}} if i % 3 != 1 else None,
            )
            engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
        cached = 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                cached += bool(output.finished) * (output.num_cached_tokens or 0)
                for part in output.outputs:
                    key = output.request_id + (f"/{part.index}" if part.index else "")
                    seen[key] = list(part.token_ids)
            for i in ABORTED:
                if len(seen.get(str(i), ())) == 10:
                    engine.abort_request([str(i)])
        engine.step()
        return seen, cached


def main(scratch, model, dtype):
    directory = str(Path(scratch, "model"))
    make_tiny_model(directory, model)
    traces, facts = {}, {}
    with Receiver(CONFIG) as receiver:
        vllm_hooks.install()
        workload = Workload(directory, dtype)
        facts["hello"] = receiver.wait_ready(1.0)
        tokens, facts["cached"] = workload.run()
        vllm_hooks.flush()
        (capture,) = vllm_hooks._captures
        facts["preemptions"] = capture.tracker.preemptions
        facts["compiled"] = capture._compiled is not None
        for key, found in tokens.items():
            asked = int(key.partition("/")[0]) % 3 != 1
            trace = receiver.get(key, timeout=10.0 if asked else 0.01, n_tokens=len(found))
            if trace is not None:
                traces[f"{key}:stats"] = trace.stats
                traces[f"{key}:tokens"] = np.stack([trace.token_entropy, trace.self_certainty])
        facts["counters"] = receiver.counters
        del capture
        close(workload)
    gc.collect()
    plain = Workload(directory, dtype)
    off, _ = plain.run()
    close(plain)
    runs = {
        "config": CONFIG.to_dict(),
        "prompts": make_prompts(),
        "lengths": {str(i): 10 if i in ABORTED else N_TOKENS for i in range(N_REQUESTS)},
        "tokens": tokens,
        "off": off,
        "facts": facts,
    }
    Path(scratch, "runs.json").write_text(json.dumps(runs))
    np.savez(Path(scratch, "traces.npz"), **traces)


if __name__ == "__main__":
    main(*sys.argv[1:])
