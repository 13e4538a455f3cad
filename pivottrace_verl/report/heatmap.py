"""Pivots along example rollouts: which traced rollouts to show, and their tokens' colours.

Contract: the traces are `traces/part-*.safetensors`, a tensor `<pt_id>/<g>` [T, L, H, F] a rollout,
beside a JSON of the same stem with its tokens. Signal, changes and pivots come from
`pivottrace_verl.pivots` under the run's frozen detector, so the page shows what was counted.
Nothing here is random: the examples are the least, middle and most uncertain of the traced prompts,
and of each prompt the rollout with the median number of pivots.
Axes: G rollouts of a prompt, T tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from pivottrace_verl.errors import PivotTraceError
from pivottrace_verl.files import first_line, read_object
from pivottrace_verl.pivots import DetectorConfig, changes, find_pivots, signal

LEVELS = 8
"""Shades above zero; the middle one starts at tau, the last at twice tau."""

MAX_TOKENS = 1500
"""Tokens of one example that are drawn; the page says how many it left out."""

BANDS = ("low", "middle", "high")


@dataclass(frozen=True)
class Token:
    """One generated token: `level` 0 (no change) to LEVELS, `text` with line ends made visible."""

    text: str
    level: int
    pivot: bool
    title: str


@dataclass(frozen=True)
class TracedRollout:
    """One rollout with its trace turned into signal [T], change [T] and pivot indices."""

    rollout: int
    seed: int | None
    answer: str | None
    tokens: list[str]
    signal: np.ndarray
    change: np.ndarray
    pivots: list[int]

    @property
    def density(self) -> float:
        return len(self.pivots) / max(len(self.tokens), 1)


@dataclass(frozen=True)
class TraceFile:
    """Where one part's tensors lie, and the JSON entries beside it."""

    path: Path
    entries: dict[str, dict[str, Any]]


def trace_index(directory: Path) -> dict[str, list[tuple[int, TraceFile]]]:
    """pt_id -> [(rollout g, its file)], g ascending, over all parts that are whole."""
    index: dict[str, list[tuple[int, TraceFile]]] = {}
    for path in sorted(directory.glob("part-*.safetensors")):
        beside = path.with_suffix(".json")
        if not beside.exists():  # The part is being written: its tokens come last.
            continue
        part = TraceFile(path, read_object(beside))
        for key, entry in part.entries.items():
            pt_id, _, g = key.rpartition("/")
            if not (g.isascii() and g.isdigit()):
                raise PivotTraceError(
                    f"{beside} names the trace '{key}', which is no prompt's id and rollout."
                )
            if not isinstance(entry, dict) or not isinstance(entry.get("tokens"), list):
                raise PivotTraceError(f"{beside} holds no tokens of the trace '{key}'.")
            index.setdefault(pt_id, []).append((int(g), part))
    return {pt_id: sorted(rows, key=lambda row: row[0]) for pt_id, rows in index.items()}


def read_rollout(pt_id: str, g: int, part: TraceFile, detector: DetectorConfig) -> TracedRollout:
    """Load one trace and run the detector over it.

    Raises PivotTraceError when the trace is not in the file or has another length than its tokens.
    """
    key = f"{pt_id}/{g}"
    try:
        with safe_open(part.path, framework="numpy") as file:
            if key not in file.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                raise PivotTraceError(f"{part.path} holds no trace {key}, which its JSON names.")
            trace = np.asarray(file.get_tensor(key), dtype=np.float32)
    except SafetensorError as error:
        raise PivotTraceError(
            f"{part.path} is not a readable safetensors file: {first_line(error)}."
        ) from error
    entry = part.entries[key]
    tokens = [str(token) for token in entry["tokens"]]
    if len(tokens) != len(trace):
        raise PivotTraceError(
            f"Trace {key} in {part.path} has {len(trace)} rows, but its JSON has {len(tokens)} "
            "tokens."
        )
    x = np.asarray(signal(trace, detector), dtype=np.float64)
    return TracedRollout(
        rollout=g,
        seed=entry.get("seed"),
        answer=entry.get("answer"),
        tokens=tokens,
        signal=x,
        change=np.asarray(changes(x, detector), dtype=np.float64),
        pivots=[int(i) for i in find_pivots(trace, detector)],
    )


def median_rollout(
    pt_id: str, rows: list[tuple[int, TraceFile]], detector: DetectorConfig
) -> TracedRollout:
    """The rollout whose number of pivots is the (lower) median of the prompt's traced rollouts."""
    rollouts = [read_rollout(pt_id, g, part, detector) for g, part in rows]
    rollouts.sort(key=lambda r: (len(r.pivots), r.rollout))
    return rollouts[(len(rollouts) - 1) // 2]


def choose(uncertainty: Mapping[str, float], n: int = 7) -> list[tuple[str, str]]:
    """[(pt_id, band)], at most `n`: low and high ends and the middle of the given prompts.

    The bands are places among the *traced* prompts; each example carries its rank in the pool.
    """
    order = sorted(uncertainty, key=lambda pt_id: (uncertainty[pt_id], pt_id))
    if len(order) <= n:
        cuts = len(order) / 3
        return [(pt_id, BANDS[min(int(i / cuts), 2)]) for i, pt_id in enumerate(order)]
    low = n // 3
    high = n // 3
    middle = n - low - high
    start = (len(order) - middle) // 2
    return (
        [(pt_id, "low") for pt_id in order[:low]]
        + [(pt_id, "middle") for pt_id in order[start : start + middle]]
        + [(pt_id, "high") for pt_id in order[len(order) - high :]]
    )


def visible(text: str) -> str:
    """A token's text with its line ends shown (and kept), and a mark for no text at all."""
    return text.replace("\r", "␍").replace("\n", "↵\n").replace("\t", "⇥\t") if text else "∅"


def heat(rollout: TracedRollout, tau: float | None) -> list[Token]:
    """The first MAX_TOKENS tokens with shade, pivot mark and a tooltip with the values.

    A change of tau lies in the middle of the scale; without tau the largest change does.
    """
    finite = rollout.change[np.isfinite(rollout.change)]
    unit = tau or float(finite.max(initial=0.0)) or 1.0
    pivots = set(rollout.pivots)
    out = []
    for i, text in enumerate(rollout.tokens[:MAX_TOKENS]):
        change, x = float(rollout.change[i]), float(rollout.signal[i])
        shade = LEVELS / 2 * change / unit if math.isfinite(change) else 0.0
        pivot = i in pivots
        out.append(
            Token(
                visible(text),
                max(0, min(LEVELS, int(shade))),
                pivot,
                f"token {i}: signal {x:.4f}, change {change:.4f}" + (", pivot" if pivot else ""),
            )
        )
    return out
