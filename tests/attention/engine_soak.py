"""Many short requests in one engine, in this process, so that its memory is all there is to see.

    python engine_soak.py SCRATCH on|off

On: requests that ask for their trace and such that do not, one in ten aborted, one in ten with
n = 2, some continued after an abort. Off: the same, none of them asking. Writes `runs.json` with
counts of entries and memory after the warm-up and at the end; `traces.npz` is empty.
"""

import gc
import json
import os
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import torch
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

from pivottrace_verl.attention import vllm_hooks
from pivottrace_verl.attention.channel import Receiver, Trace
from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.attention.selftest import make_tiny_model

WARM_UP, REQUESTS, ROUND = 2_000, 10_000, 200


def resident_mib():
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def own_kib():
    """What the package's own lines allocated and still hold, as Python and numpy tell it."""
    gc.collect()
    ours = tracemalloc.Filter(True, "*/pivottrace_verl/*")
    snapshot = tracemalloc.take_snapshot().filter_traces([ours])
    return sum(trace.size for trace in snapshot.traces) / 2**10


class Soak:
    def __init__(self, directory, receiver, asking):
        self.receiver, self.asking = receiver, asking
        self.llm = LLM(
            directory,
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            block_size=32,
            max_model_len=128,
            max_num_seqs=64,
            max_num_batched_tokens=512,
            num_gpu_blocks_override=257,
        )
        self.engine = self.llm.llm_engine
        (self.capture,) = vllm_hooks._captures
        self.generator = torch.Generator().manual_seed(0)
        self.number = 0
        self.facts = {"asked": 0, "traced": 0, "aborted": 0, "joined": 0}

    def prompt(self):
        length = int(torch.randint(1, 24, (1,), generator=self.generator))
        return torch.randint(2, 384, (length,), generator=self.generator).tolist()

    def add(self, prompt, n_tokens, asked, n=1, prompt_tokens=None):
        name = f"soak-{self.number}"
        self.number += 1
        ask = {"key": name, **({"prompt_tokens": prompt_tokens} if prompt_tokens else {})}
        params = SamplingParams(
            n=n,
            temperature=1.0,
            max_tokens=n_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.CUMULATIVE,
            extra_args={"pivottrace": ask} if asked else None,
        )
        self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
        return name

    def drain(self, seen, abort=()):
        """Step until all is done; of the requests in `abort` none goes past its first tokens."""
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                for child in output.outputs:
                    seen[output.request_id, child.index] = list(child.token_ids)
            ready = [name for name in abort if seen.get((name, 0))]
            if ready:
                self.engine.abort_request(ready)
                abort = [name for name in abort if name not in ready]
        self.engine.step()
        vllm_hooks.flush()

    def round(self):
        seen, asks, aborted, prompts = {}, {}, [], {}
        for i in range(ROUND):
            asked, n = self.asking and i % 3 != 0, 2 if i % 10 == 5 else 1
            prompt = self.prompt()
            name = self.add(prompt, 2 + i % 3, asked, n)
            asks[name], prompts[name] = asked, prompt
            if i % 10 == 1:
                aborted.append(name)
        self.drain(seen, aborted)
        parts = self.collect(seen, asks)
        # Half of the aborted requests go on where they were.
        again, seen = {}, {}
        for name in aborted[::2]:
            if asks[name]:
                tokens = parts[name][1]
                follow = self.add(prompts[name] + tokens, 2, True, prompt_tokens=len(prompts[name]))
                again[follow] = name
        self.drain(seen)
        for follow, (trace, tokens) in self.collect(seen, dict.fromkeys(again, True)).items():
            first, before = parts[again[follow]]
            joined = Trace.join([first, trace])
            self.facts["joined"] += len(joined.stats) == len(before) + len(tokens)
        self.facts["aborted"] += len(aborted)

    def collect(self, seen, asks):
        parts = {}
        for (name, child), tokens in seen.items():
            if not asks[name]:
                continue
            key = name if child == 0 else f"{name}/{child}"
            trace = self.receiver.get(key, timeout=20.0, n_tokens=len(tokens))
            self.facts["asked"] += 1
            self.facts["traced"] += trace is not None
            parts[key] = (trace, tokens)
        return parts

    def entries(self):
        receiver, capture = self.receiver, self.capture
        return {
            "tracked": len(capture.tracker.requests),
            "runner": len(capture.runner.requests),
            "held": len(receiver._held),
            "held_bytes": receiver._held_bytes,
            "waiting": len(receiver._waiting),
            "given_up": len(receiver._given_up),
            "slots": len(capture.store.owner),
        }


def main(scratch, asking):
    directory = str(Path(scratch, "llama"))
    make_tiny_model(directory)
    tracemalloc.start()
    with Receiver(CaptureConfig()) as receiver:
        vllm_hooks.install()
        soak = Soak(directory, receiver, asking == "on")
        while soak.number < WARM_UP:
            soak.round()
        first, before = soak.number, soak.entries()
        resident, own = [resident_mib()], own_kib()
        while soak.number < first + REQUESTS:
            soak.round()
            if (soak.number - first) // 2_500 >= len(resident):
                resident.append(resident_mib())
        facts = {
            **soak.facts,
            "requests": soak.number - first,
            "before": before,
            "after": soak.entries(),
            "resident_mib": [*resident, resident_mib()],
            "own_kib": [own, own_kib()],
            "counters": receiver.counters,
        }
        soak.engine.engine_core.shutdown()
    Path(scratch, "runs.json").write_text(json.dumps({"soak": facts}))
    np.savez(Path(scratch, "traces.npz"))


if __name__ == "__main__":
    main(*sys.argv[1:])
