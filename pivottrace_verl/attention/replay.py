"""The same statistics from a Hugging Face model: for engines capture cannot serve, and as oracle.

The model reads prompt and output at once (teacher forcing), and the softmax rows are its own
(`model_rows`). Row i is the query at position P-1+i, the one whose logits choose generated token i;
the row of the last token itself is never computed while generating and is left out.

Contract: a trace depends on its own rollout; how rollouts are batched shows in the last bits at
most, and the same rollouts are batched the same way.
Axes: P prompt tokens, T generated tokens, L traced layers, H head groups, F features.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pivottrace_verl.attention.channel import Trace
from pivottrace_verl.attention.config import TOKEN_STATISTICS, CaptureConfig
from pivottrace_verl.attention.heads import HeadConfig
from pivottrace_verl.attention.model_rows import ELEMENTS, Ids, Rows, attention_of, spans_of
from pivottrace_verl.attention.reference import TINY, dense_statistics, group_heads
from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.hidden_states import batches, padded
from pivottrace_verl.pivots import FEATURES


class Replayer:
    """The model in a Hugging Face folder, replaying rollouts: on a GPU in the model's own
    precision, and where torch has none on the CPU in float32, as the engine there.

    Raises PivotTraceError for layers or heads that the model does not have or does not show.
    """

    def __init__(self, folder: Path, config: CaptureConfig) -> None:
        from transformers import AutoModelForCausalLM

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.float32 if self._device == "cpu" else "auto"
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self._config = config
        # One token, so that what cannot be replayed is told before anything is generated.
        replay(self._model, [0], [0], config)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Replay inside: only then the model takes memory of the accelerator."""
        self._model.to(self._device)
        try:
            yield
        finally:
            self._model.to("cpu")
            torch.cuda.empty_cache()  # nothing where there is no GPU

    def __call__(self, rollouts: Sequence[tuple[Ids, Ids]]) -> list[Trace | None]:
        """The traces of (prompt ids, output ids); None for an empty output."""
        asked = [i for i, (_, output) in enumerate(rollouts) if output]
        found = replay_all(self._model, [rollouts[i] for i in asked], self._config)
        traces: list[Trace | None] = [None] * len(rollouts)
        for i, trace in zip(asked, found, strict=True):
            traces[i] = trace
        return traces


def replay(
    model: Any, prompt_ids: Ids, output_ids: Ids, config: CaptureConfig, key: str = "replay"
) -> Trace:
    """The trace of one rollout, by a forward pass of `model` (use float32 for exact figures).

    Raises PivotTraceError for an empty prompt or output, and for layers the model does not have.
    """
    return replay_all(model, [(prompt_ids, output_ids)], config, key)[0]


def replay_all(
    model: Any, rollouts: Sequence[tuple[Ids, Ids]], config: CaptureConfig, key: str = "replay"
) -> list[Trace]:
    """The traces of several rollouts (prompt ids, output ids), in batches; `replay` of each."""
    if not all(prompt and output for prompt, output in rollouts):
        raise PivotTraceError("A replay needs at least one prompt token and one output token.")
    layers = traced_layers(model, config)
    traces: dict[int, Trace] = {}
    for batch in batches([len(p) + len(o) - 1 for p, o in rollouts]):
        chosen = [rollouts[i] for i in batch]
        for i, trace in zip(batch, _replay_batch(model, chosen, layers, config, key), strict=True):
            traces[i] = trace
    return [traces[i] for i in range(len(rollouts))]


def _replay_batch(
    model: Any,
    rollouts: Sequence[tuple[Ids, Ids]],
    layers: Sequence[int],
    config: CaptureConfig,
    key: str,
) -> Iterator[Trace]:
    parts: dict[tuple[int, int], list[torch.Tensor]] = {}

    def take(rows: Rows) -> None:
        statistics = dense_statistics(
            rows.probabilities,
            rows.lse,
            rows.positions,
            len(rollouts[rows.sequence][0]),
            config,
            rows.learnt,
        )
        groups = config.choose_heads(len(rows.probabilities), layers.index(rows.layer))
        grouped = group_heads(statistics, groups).float().cpu()
        parts.setdefault((rows.sequence, rows.layer), []).append(grouped)

    ids = padded(rollouts).to(model.device)
    first = min(len(prompt) for prompt, _ in rollouts) - 1
    with torch.no_grad(), attention_of(model, layers, spans_of(rollouts), take):
        logits = model(ids, use_cache=False, logits_to_keep=ids.shape[1] - first).logits
    for i, (prompt, output) in enumerate(rollouts):
        stats = torch.stack([torch.cat(parts[i, layer]) for layer in layers], dim=1)
        start = len(prompt) - 1 - first
        yield Trace(key, stats.numpy(), *_of_tokens(logits[i, start : start + len(output)]))


def _of_tokens(logits: torch.Tensor) -> Iterator[np.ndarray]:
    """Entropy and self-certainty [T] of the distributions over [T, V] logits."""
    found = []
    for part in logits.split(max(1, ELEMENTS // logits.shape[-1])):
        log_p = part.double().log_softmax(-1)
        entropy = torch.special.entr(log_p.exp()).sum(-1)
        certainty = -math.log(log_p.shape[-1]) - log_p.mean(-1)
        found.append(torch.stack([entropy, certainty]))
    yield from torch.cat(found, dim=1).float().cpu().numpy()


def head_distances(
    model: Any,
    rollouts: Sequence[tuple[Ids, Ids]],
    layers: Sequence[int],
    config: HeadConfig,
    progress: Callable[[int], None],
) -> tuple[np.ndarray, np.ndarray]:
    """How far back each query head looks, and how much it leaves on the sink.

    Args:
        rollouts: (prompt ids, output ids), both with at least one token.
        progress: called with the number of rollouts read so far.
    Returns:
        [L, H] sum A[t,s] (t-s) / sum A[t,s] over all rows t that chose a token and all keys s past
        the sink (of the response only, if the configuration says so), in tokens; a row counts by
        the attention it has left there. [L, H] mean over the rows of the attention on the sink.
    """
    base = getattr(model, "base_model", model)  # the head's logits are not needed
    sums = torch.zeros(3, len(layers), model.config.get_text_config().num_attention_heads).double()
    n_rows = 0
    for done, rollout in enumerate(rollouts, start=1):
        prompt = len(rollout[0])
        first = max(prompt, config.sink) if config.response_only else config.sink

        def take(rows: Rows, first: int = first) -> None:
            a, i = rows.probabilities.double(), layers.index(rows.layer)
            keys = torch.arange(a.shape[-1], device=a.device)
            distance = (rows.positions.to(a.device)[:, None] - keys).clamp(min=0).double()
            sums[0, i] += torch.einsum("hns,ns->h", a, distance * (keys >= first)).cpu()
            sums[1, i] += a[..., first:].sum((1, 2)).cpu()
            sums[2, i] += a[..., : config.sink].sum((1, 2)).cpu()

        with torch.no_grad(), attention_of(model, layers, spans_of([rollout]), take):
            base(padded([rollout]).to(model.device), use_cache=False)
        n_rows += len(rollout[1])
        progress(done)
    return (sums[0] / sums[1].clamp_min(TINY)).numpy(), (sums[2] / n_rows).numpy()


def full_attention_layers(model: Any) -> list[int]:
    """The layers of a model whose rows see the whole context."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [i for i, kind in enumerate(kinds) if kind == "full_attention"]


def traced_layers(model: Any, config: CaptureConfig) -> tuple[int, ...]:
    """As the capture's: layers with a sliding window only if they are named, or alone."""
    far = full_attention_layers(model)
    if config.layers is not None or not far:
        far = list(range(model.config.get_text_config().num_hidden_layers))
    return config.choose_layers(far)


def compare(trace: Trace, reference: Trace, config: CaptureConfig) -> dict[str, float]:
    """Largest absolute difference of each feature, distances in units of their window, and of
    the token statistics.

    Raises PivotTraceError where the two traces do not have the same shape.
    """
    if trace.stats.shape != reference.stats.shape:
        raise PivotTraceError(
            f"Traces of shape {trace.stats.shape} and {reference.stats.shape} cannot be compared."
        )
    difference = np.abs(trace.stats - reference.stats).max(axis=(0, 1, 2))
    errors = {
        name: float(value) / (config.window if name.endswith("distance") else 1)
        for name, value in zip(FEATURES, difference, strict=True)
    }
    tokens = {
        name: float(np.abs(getattr(trace, name) - getattr(reference, name)).max())
        for name in TOKEN_STATISTICS
    }
    return {**errors, **tokens}
