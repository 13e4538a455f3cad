"""The same scenarios in two engines, captured by torch and by the kernels; a process of its own.

    python device_runs.py SCRATCH

There is no GPU here, so the device path runs on vLLM's CPU backend, its kernels in Triton's
interpreter, which is slow: few tokens, two layers. Scenarios as in `engine_runs.py`, whose files it
writes; keys begin with `torch` or `kernel`.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from engine_runs import close
from vllm import LLM, SamplingParams

from pivottrace_verl.attention import vllm_hooks
from pivottrace_verl.attention.channel import Receiver
from pivottrace_verl.attention.config import ENV_DISABLE, CaptureConfig
from pivottrace_verl.attention.selftest import make_tiny_model

CONFIG = CaptureConfig(layers=(1, 2), head_groups=((0,), (1, 3)), window=8, sink=2)
N_BLOCKS = 9
"""One block is vLLM's own: 8 x 32 tokens, too few for the preemption scenario."""


class Scenarios:
    def __init__(self, name, directory, receiver):
        self.name, self.receiver = name, receiver
        self.requests, self.traces, self.facts = {}, {}, {}
        self.llm = LLM(
            directory,
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            block_size=32,
            max_model_len=256,
            max_num_seqs=4,
            enable_chunked_prefill=True,
            max_num_batched_tokens=64,
            num_gpu_blocks_override=N_BLOCKS,
            enable_prefix_caching=True,
        )
        self.generator = torch.Generator().manual_seed(7)

    @property
    def capture(self):
        core = self.llm.llm_engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        (capture,) = [c for c in vllm_hooks._captures if c.runner is runner]
        return capture

    def prompt(self, length):
        return torch.randint(2, 384, (length,), generator=self.generator).tolist()

    def key(self, scenario, i):
        return f"{self.name}/{scenario}/{i}"

    def sampling(self, key, n_tokens, **values):
        asks = None if key is None else {"pivottrace": {"key": key}}
        values = {"temperature": 0.0, **values}
        return SamplingParams(
            max_tokens=n_tokens, ignore_eos=True, detokenize=False, extra_args=asks, **values
        )

    def generate(self, scenario, prompts, n_tokens, asks=None, **values):
        params = [
            self.sampling(
                self.key(scenario, i) if not asks or asks[i] else None, n_tokens, **values
            )
            for i in range(len(prompts))
        ]
        outputs = self.llm.generate(
            [{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False
        )
        vllm_hooks.flush()
        for i, output in enumerate(outputs):
            for child, sequence in enumerate(output.outputs):
                key = self.key(scenario, i) + (f"/{child}" if child else "")
                asked = not asks or asks[i]
                self.note(scenario, key, prompts[i], list(sequence.token_ids), asked)
                self.requests[scenario][-1]["cached"] = output.num_cached_tokens

    def note(self, scenario, key, prompt, tokens, asked=True):
        self.requests.setdefault(scenario, []).append(
            {"key": key, "prompt": prompt, "tokens": tokens}
        )
        trace = self.receiver.get(key, timeout=10.0 if asked else 0.1, n_tokens=len(tokens))
        if trace is not None:
            self.traces[f"{key}:stats"] = trace.stats
            self.traces[f"{key}:tokens"] = np.stack([trace.token_entropy, trace.self_certainty])

    def run(self):
        self.generate("plain", [self.prompt(n) for n in (1, 5, 40)], 8)
        long = self.prompt(150)
        self.generate("chunked", [long], 5)
        self.generate("prefix_cached", [[*long, 5, 6, 7]], 5)
        self.generate("children", [self.prompt(20)], 5, n=2, temperature=1.0)
        # Log-probabilities of the prompt go through compute_logits a second time in a step.
        mixed = [self.prompt(n) for n in (3, 70, 10, 30)]
        self.generate("mixed", mixed, 6, [True, False] * 2, prompt_logprobs=1)
        self.abort()
        self.preempt()

    def abort(self):
        engine, seen = self.llm.llm_engine, {}
        prompts = [self.prompt(20), self.prompt(30)]
        keys = [self.key("aborted", i) for i in range(2)]
        for key, prompt in zip(keys, prompts, strict=True):
            engine.add_request(key, {"prompt_token_ids": prompt}, self.sampling(key, 9))
        while engine.has_unfinished_requests():
            for output in engine.step():
                seen[output.request_id] = list(output.outputs[0].token_ids)
            if len(seen.get(keys[0], ())) == 4:
                engine.abort_request(keys[:1])
        vllm_hooks.flush()
        for key, prompt in zip(keys, prompts, strict=True):
            self.note("aborted", key, prompt, seen[key])
        self.facts["tracked_after_aborts"] = len(self.capture.tracker.requests)

    def preempt(self):
        """More tokens than the cache holds."""
        before = self.capture.tracker.preemptions
        self.generate("preempted", [self.prompt(n) for n in (60, 58, 62, 61)], 14)
        self.facts["preemptions"] = self.capture.tracker.preemptions - before


def main(scratch):
    directory = str(Path(scratch, "llama"))
    make_tiny_model(directory, "llama")
    runs, traces = {}, {}
    stock = vllm_hooks.uses_kernel
    for name in ("torch", "kernel"):
        with Receiver(CONFIG) as receiver:
            vllm_hooks.install()
            vllm_hooks.uses_kernel = (lambda runner: True) if name == "kernel" else stock
            scenarios = Scenarios(name, directory, receiver)
            facts = scenarios.facts
            facts["hello"] = receiver.wait_ready(1.0)
            facts["capture"] = type(scenarios.capture).__name__
            scenarios.run()
            facts["unchecked"] = scenarios.capture._unchecked
            facts["counters"], facts["held"] = receiver.counters, list(receiver._held)
            close(scenarios)
        runs[name] = {"requests": scenarios.requests, "facts": facts}
        traces.update(scenarios.traces)
    Path(scratch, "runs.json").write_text(json.dumps(runs))
    np.savez(Path(scratch, "traces.npz"), **traces)


if __name__ == "__main__":
    os.environ.pop(ENV_DISABLE, None)
    main(sys.argv[1])
