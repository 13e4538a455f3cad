"""Runs the scenarios of the parity tests in real vLLM engines; started as a process of its own.

    python engine_runs.py SCRATCH

vLLM's CPU worker rebinds threads and stubs accelerator calls for the whole process, so engines
stay out of the process that runs the tests. Writes `runs.json` (tokens and facts of each scenario)
and `traces.npz` (what the receiver got) into SCRATCH, and the models beside them.
"""

import gc
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from vllm import LLM, SamplingParams

from pivottrace_verl.attention import cpu_capture, vllm_hooks
from pivottrace_verl.attention.channel import Receiver
from pivottrace_verl.attention.config import ENV_DISABLE, CaptureConfig
from pivottrace_verl.attention.cpu_rows import compiled_rows
from pivottrace_verl.attention.selftest import make_tiny_model

BLOCK = 32
BUDGET = 64
"""Tokens a step may compute where prompts are prefilled in chunks."""
CHUNKED = {"llama": True, "qwen2": False}
"""vLLM 0.28 stops with an error where a request with a seed of its own is prefilled in chunks on a
CPU (`CPU Generator does not use offset`), so seeds are tried where chunks are off."""
N_BLOCKS = 33
"""One block is vLLM's own: 32 x 32 tokens, too few for the preemption scenario."""

CONFIGS = {
    "llama": CaptureConfig(),
    "qwen2": CaptureConfig(
        layers=(0, 3), head_groups=((0,), (1, 2), (3,)), window=8, sink=2, wire="float32"
    ),
}


class Scenarios:
    """The scenarios on one engine; every request that asks gets its own key."""

    def __init__(self, name, directory, receiver, dtype="float32"):
        self.name, self.receiver, self.chunked = name, receiver, CHUNKED[name]
        self.requests, self.traces, self.facts = {}, {}, {}
        self.llm = LLM(
            directory,
            skip_tokenizer_init=True,
            dtype=dtype,
            enforce_eager=True,
            block_size=BLOCK,
            max_model_len=512,
            max_num_seqs=12,
            enable_chunked_prefill=self.chunked,
            max_num_batched_tokens=BUDGET if self.chunked else 1024,
            num_gpu_blocks_override=N_BLOCKS,
            enable_prefix_caching=True,
        )
        self.generator = torch.Generator().manual_seed(7)

    @property
    def capture(self):
        (capture,) = [c for c in vllm_hooks._captures if c.runner is self.runner]
        return capture

    @property
    def runner(self):
        core = self.llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker.model_runner

    def prompt(self, length):
        return torch.randint(2, 384, (length,), generator=self.generator).tolist()

    def generate(self, scenario, prompts, n_tokens, asks=None, **sampling):
        params = []
        for i in range(len(prompts)):
            key = f"{self.name}/{scenario}/{i}"
            asked = asks is None or asks[i]
            values = {"temperature": 1.0, "seed": None if self.chunked else i, **sampling}
            params.append(
                SamplingParams(
                    max_tokens=n_tokens,
                    ignore_eos=True,
                    detokenize=False,
                    extra_args={"pivottrace": {"key": key}} if asked else None,
                    **values,
                )
            )
        outputs = self.llm.generate(
            [{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False
        )
        if self.receiver is not None:
            vllm_hooks.flush()
        for i, output in enumerate(outputs):
            for child, sequence in enumerate(output.outputs):
                key = f"{self.name}/{scenario}/{i}" + (f"/{child}" if child else "")
                asked = asks is None or asks[i]
                self.note(scenario, key, prompts[i], list(sequence.token_ids), output, asked)
        return outputs

    def note(self, scenario, key, prompt, tokens, output=None, asked=True):
        self.requests.setdefault(scenario, []).append(
            {
                "key": key,
                "prompt": prompt,
                "tokens": tokens,
                "cached": getattr(output, "num_cached_tokens", None),
            }
        )
        if self.receiver is None:
            return
        trace = self.receiver.get(key, timeout=10.0 if asked else 0.1, n_tokens=len(tokens))
        if trace is not None:
            self.traces[f"{key}:stats"] = trace.stats
            self.traces[f"{key}:tokens"] = np.stack([trace.token_entropy, trace.self_certainty])

    def greedy(self):
        self.generate("greedy", GREEDY_PROMPTS, 40, temperature=0.0, seed=None)

    def run(self):
        self.generate("plain", [self.prompt(n) for n in (1, 5, 17, 40)], 40)
        self.resume(self.requests["plain"][2])
        long = [self.prompt(n) for n in (150, 200)]
        self.generate("long", long, 24)
        self.generate("prefix_cached", [[*p, 5, 6, 7] for p in long], 24)
        self.generate("repeated", [self.prompt(70)] * 4, 40)
        self.generate("children", [self.prompt(30)], 20, n=4)
        self.named()
        # Log-probabilities of the prompt go through compute_logits a second time in a step.
        mixed = [self.prompt(n) for n in (3, 30, 80, 10, 50, 7)]
        self.generate("mixed", mixed, 20, [True, False] * 3, prompt_logprobs=1)
        self.abort()
        self.greedy()
        self.preempt()

    def resume(self, begun):
        """Go on with a rollout after 15 of its tokens, as a request of its own."""
        key, prompt = f"{self.name}/resumed/0", [*begun["prompt"], *begun["tokens"][:15]]
        asked = {"key": key, "prompt_tokens": len(begun["prompt"])}
        params = SamplingParams(
            max_tokens=40, ignore_eos=True, detokenize=False, extra_args={"pivottrace": asked}
        )
        output = self.llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0]
        vllm_hooks.flush()
        self.note("resumed", key, prompt, list(output.outputs[0].token_ids))
        self.requests["resumed"][0]["prompt_tokens"] = asked["prompt_tokens"]

    def named(self):
        """Requests of one rollout whose ids look as if they were children of `ab`."""
        engine, prompts, seen = self.llm.llm_engine, {}, {}
        for name in ("12_ab", "0_ab"):
            prompts[name] = self.prompt(20)
            asked = {"key": f"{self.name}/named/{name}"}
            sampling = SamplingParams(
                max_tokens=10, ignore_eos=True, detokenize=False, extra_args={"pivottrace": asked}
            )
            engine.add_request(name, {"prompt_token_ids": prompts[name]}, sampling)
        while engine.has_unfinished_requests():
            for output in engine.step():
                seen[output.request_id] = list(output.outputs[0].token_ids)
        vllm_hooks.flush()
        for name, prompt in prompts.items():
            self.note("named", f"{self.name}/named/{name}", prompt, seen[name])

    def abort(self):
        """Two requests, one aborted after some tokens; with chunked prompts a third, aborted
        before its first token."""
        engine = self.llm.llm_engine
        prompts = [self.prompt(20), self.prompt(30)]
        seen = {}
        for i, prompt in enumerate(prompts):
            key = f"{self.name}/aborted/{i}"
            sampling = SamplingParams(
                max_tokens=30, ignore_eos=True, detokenize=False,
                extra_args={"pivottrace": {"key": key}},
            )  # fmt: skip
            engine.add_request(key, {"prompt_token_ids": prompt}, sampling)
        early = f"{self.name}/aborted/early"
        while engine.has_unfinished_requests():
            for output in engine.step():
                seen[output.request_id] = list(output.outputs[0].token_ids)
            if len(seen.get(f"{self.name}/aborted/0", ())) == 10:
                engine.abort_request([f"{self.name}/aborted/0"])
                asks = SamplingParams(extra_args={"pivottrace": {"key": early}})
                if self.chunked:
                    engine.add_request(early, {"prompt_token_ids": self.prompt(300)}, asks)
                    engine.step()
                    engine.abort_request([early])
        engine.step()
        vllm_hooks.flush()
        for i, prompt in enumerate(prompts):
            key = f"{self.name}/aborted/{i}"
            self.note("aborted", key, prompt, seen[key])
        self.facts["tracked_after_aborts"] = len(self.capture.tracker.requests)

    def preempt(self):
        """More tokens than the cache holds; among them prompts that are other requests' outputs,
        so that a resumed request finds its tokens in blocks somebody else computed."""
        before = self.capture.tracker.preemptions
        self.generate("preempted", [self.prompt(n) for n in (20, 40, 60, 80, 30, 50)], 200)
        base = self.prompt(30)
        first = self.generate("story", [base], 150, temperature=0.0, seed=None)
        story = [*base, *first[0].outputs[0].token_ids]
        prompts = [story[: 30 + 30 * k] for k in range(5)] + [self.prompt(40) for _ in range(3)]
        self.generate("preempted_shared", prompts, 160, temperature=0.0, seed=None)
        self.facts["preemptions"] = self.capture.tracker.preemptions - before


def close(scenarios):
    scenarios.llm.llm_engine.engine_core.shutdown()
    del scenarios.llm
    gc.collect()


def no_compiled_rows(*arguments):
    return None


def untouched(llm_runner):
    """True when no instance attribute of this worker is wrapped."""
    layers = llm_runner.compilation_config.static_forward_context.values()
    return (
        "execute_model" not in vars(llm_runner)
        and "compute_logits" not in vars(llm_runner.model)
        and not any("forward" in vars(layer.impl) for layer in layers)
    )


def refusal(directory, **settings):
    """The sentence with which an engine refuses to start."""
    try:
        LLM(directory, skip_tokenizer_init=True, enforce_eager=True, max_model_len=64, **settings)
    except RuntimeError as error:
        return str(error)
    return None


GREEDY_PROMPTS = [
    torch.randint(2, 384, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (2, 17, 90, 130)
]


def main(scratch):
    runs, traces = {}, {}
    for name, config in CONFIGS.items():
        directory = str(Path(scratch, name))
        make_tiny_model(directory, name)
        with Receiver(config) as receiver:
            vllm_hooks.install()
            vllm_hooks.install()
            # One of the two goes the way of engines that can compile nothing.
            cpu_capture.compiled_rows = compiled_rows if name == "llama" else no_compiled_rows
            scenarios = Scenarios(name, directory, receiver)
            scenarios.facts["hello"] = receiver.wait_ready(1.0)
            scenarios.facts["compiled"] = scenarios.capture._compiled is not None
            scenarios.run()
            scenarios.facts["counters"] = receiver.counters
            scenarios.facts["held"] = list(receiver._held)
            close(scenarios)
        runs[name] = {"requests": scenarios.requests, "facts": scenarios.facts}
        traces.update(scenarios.traces)
        # Capture off: in the first case not asked for, in the second asked for and switched off.
        with Receiver(config) as receiver:
            os.environ[ENV_DISABLE] = "1"
            if name == "llama":
                receiver.close()
            off = Scenarios(name, directory, None)
            runs[name]["facts"]["off_untouched"] = untouched(off.runner)
            off.greedy()
            runs[name]["off"] = off.requests["greedy"]
            runs[name]["facts"]["off_hello"] = receiver.engine
            close(off)
            del os.environ[ENV_DISABLE]
    with Receiver(CaptureConfig()) as receiver:
        try:
            cpu_capture.compiled_rows = compiled_rows
            half = Scenarios("llama", str(Path(scratch, "llama")), receiver, dtype="bfloat16")
            half.generate("bfloat16", [half.prompt(n) for n in (10, 150)], 60)
            runs["llama"]["requests"].update(half.requests)
            traces.update(half.traces)
            close(half)
        except RuntimeError as error:  # an instruction set whose keys cannot be read back
            runs["llama"]["facts"]["bfloat16"] = str(error)
        runs["refusals"] = {"quantised": refusal(directory, kv_cache_dtype="fp8")}
    Path(scratch, "runs.json").write_text(json.dumps(runs))
    np.savez(Path(scratch, "traces.npz"), **traces)


if __name__ == "__main__":
    main(sys.argv[1])
