"""One vLLM engine of `tests.bench.attention`, in a process of its own.

    python -m tests.bench.attention_engine MODE MODEL DTYPE LONGEST

Reads one JSON request a line (seed, vocabulary, n, prompt, new, every) and answers with one line:
of each step in which all requests decode whether it was captured (or copied), its seconds and those
in our hooks; how many complete traces arrived, and the seconds that reading and sending them took.
`every` 1 captures all steps, 2 every second one, whose traces are not complete, of course. MODE is
`off`, `layers_N`, `torch_N` (as `layers_N`, without compiled code) or `copy_N`.
"""

import itertools
import json
import os
import sys
import time
from typing import Any

from pivottrace_verl.attention.channel import Receiver
from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.attention.selftest import ENVIRONMENT

MARK = "PIVOTTRACE_BENCH "


def middle_layers(model: str, n: int) -> tuple[int, ...]:
    """Evenly in the middle third; the first ones of a model too small for that."""
    with open(os.path.join(model, "config.json")) as file:
        total = json.load(file)["num_hidden_layers"]
    middle = {int(total / 3 + total / 3 * (i + 0.5) / n) for i in range(n)}
    return tuple(sorted(middle)) if len(middle) == n else tuple(range(total))[:n]


def runner_of(llm: Any) -> Any:
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner


class Clock:
    """Seconds spent in some methods of an object."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def time(self, owner: Any, name: str) -> None:
        method = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        setattr(owner, name, timed)


def copy_queries_and_keys(llm: Any, layers: tuple[int, ...], clock: Clock) -> tuple[list[Any], Any]:
    """Hooks as vllm-lens has them: each request's queries and keys of this step, copied. Returns
    the copies, and what has the switch `asked`."""
    context = runner_of(llm).compilation_config.static_forward_context
    kept: list[Any] = []

    class Copy:
        asked = True

        @staticmethod
        def each(query: Any, key: Any, metadata: Any) -> None:
            starts = metadata.query_start_loc.tolist()
            for begin, end in itertools.pairwise(starts):
                kept.append((query[begin:end].cpu().clone(), key[begin:end].cpu().clone()))

    clock.time(Copy, "each")
    for name, module in context.items():
        if int(name.split(".")[2]) not in layers:
            continue

        def forward(layer: Any, query: Any, key: Any, *rest: Any, _run: Any = module.impl.forward,
                    **more: Any) -> Any:  # fmt: skip
            out = _run(layer, query, key, *rest, **more)
            if rest[2] is not None and Copy.asked:
                Copy.each(query, key, rest[2])
            return out

        module.impl.forward = forward
    return kept, Copy


def decode(
    llm: Any, clock: Clock, switched: list[Any], request: dict[str, Any]
) -> list[tuple[bool, float, float]]:
    """Generate one batch; the steps after every request has its first token. What captures or
    copies looks at its `asked` in every step."""
    import torch
    from vllm import SamplingParams

    g = torch.Generator().manual_seed(request["seed"])
    shape = (request["n"], request["prompt"])
    prompts = torch.randint(8, request["vocabulary"], shape, generator=g).tolist()
    for i, ids in enumerate(prompts):
        params = SamplingParams(
            temperature=0.0,
            max_tokens=request["new"],
            ignore_eos=True,
            detokenize=False,
            extra_args={"pivottrace": {"key": f"{request['seed']}-{i}"}},
        )
        llm.llm_engine.add_request(f"{request['seed']}-{i}", {"prompt_token_ids": ids}, params)
    started: set[str] = set()
    steps: list[tuple[bool, float, float]] = []
    while llm.llm_engine.has_unfinished_requests():
        everyone = len(started) == len(prompts)
        captured = not everyone or (len(steps) + request["seed"]) % request["every"] == 0
        for one in switched:
            one.asked = captured
        in_hooks, start = clock.seconds, time.perf_counter()
        outputs = llm.llm_engine.step()
        took = time.perf_counter() - start
        if everyone:
            steps.append((captured, took, clock.seconds - in_hooks))
        started |= {output.request_id for output in outputs}
    return steps


def main() -> None:
    mode, model, dtype, longest = sys.argv[1:]
    os.environ.update(ENVIRONMENT)
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    kind, _, number = mode.partition("_")
    layers = middle_layers(model, int(number)) if number else ()
    traced = kind in ("layers", "torch")
    receiver = Receiver(CaptureConfig(layers=layers)) if traced else None
    if receiver is not None:
        receiver.start()
    from vllm import LLM

    from pivottrace_verl.attention import cpu_capture, vllm_hooks

    if kind == "torch":
        cpu_capture.compiled_rows = lambda *_: None
    llm = LLM(
        model,
        skip_tokenizer_init=True,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=int(longest),
        max_num_seqs=16,
        max_num_batched_tokens=max(2048, int(longest)),
        enable_prefix_caching=False,
    )
    clock, kept, switched = Clock(), [], list(vllm_hooks._captures)
    if receiver is not None:
        receiver.wait_ready(5.0)
        for capture in switched:
            only_when_asked(capture)
            for name in ("observe", "record", "finish"):
                clock.time(capture, name)
    elif kind == "copy":
        kept, copies = copy_queries_and_keys(llm, layers, clock)
        switched.append(copies)
    for line in sys.stdin:
        request = json.loads(line)
        steps = decode(llm, clock, switched, request)
        kept.clear()
        sending, complete = 0.0, 0
        if receiver is not None:
            start = time.perf_counter()
            vllm_hooks.flush()
            sending = time.perf_counter() - start
            for i in range(request["n"]):
                trace = receiver.get(f"{request['seed']}-{i}", 10.0, request["new"])
                complete += trace is not None
        print(MARK + json.dumps({"steps": steps, "complete": complete, "sending": sending}),
              flush=True)  # fmt: skip


def only_when_asked(capture: Any) -> None:
    """Steps are captured while the capture's new switch `asked` is on."""
    capture.asked, observe = True, capture.observe

    def observed(scheduler_output: Any) -> None:
        observe(scheduler_output)
        capture._expecting = capture._expecting and capture.asked

    capture.observe = observed


if __name__ == "__main__":
    main()
