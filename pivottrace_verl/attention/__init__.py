"""Row statistics of attention for every generated token, captured while vLLM generates.

`config` what to capture, `channel` how traces travel from the engine to its owner (`sender` its
other end, `wire` the messages), `parts` traces of engines with several workers, `vllm_hooks` what
is wrapped inside vLLM, `support` what is refused, `keys` how vLLM's cache is read, `store` where
rows wait for their request to finish, `reference` the mathematics in torch, `first_rows` what an
engine's first requests must prove, `replay` the same statistics from a Hugging Face model (whose
softmax rows `model_rows` takes), `heads` which layers and heads are worth capturing, `selftest` the
proof that capture and replay agree on this machine.

On a CPU `cpu_capture` follows an engine's steps, and `cpu_kernel` is the mathematics compiled
(through `cpu_rows`). On a GPU `device_capture`'s hooks launch `kernel`, the same in Triton, into
`device_store`, which `device_tracker` reads; `device_layers` says which layers can be read and how.
That path was not run on a GPU yet.

The shortest use:

    receiver = Receiver(CaptureConfig())
    receiver.start()                                  # before the engine is made
    llm = vllm.LLM(...)
    llm.generate(prompt, SamplingParams(extra_args={"pivottrace": {"key": "a"}}))
    trace = receiver.get("a", timeout=5.0)            # trace.stats [T, L, H, F]

Axes: T generated tokens, L traced layers, H head groups, F features (`pivots.FEATURES`).
"""
