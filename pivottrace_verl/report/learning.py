"""What training logged: verl's file logger, read into one series a metric.

Contract: `train/metrics.jsonl` holds one object a line, {"step": int, "data": {name: number}}. A
step that appears twice (a resumed run) counts once, the later line winning. A torn line, as a
killed run leaves it (and a resumed one may append to), is left out and counted.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

Series = list[tuple[int, float]]

TRAINED_ROUTES = ("annotate", "self_train")
PARTS = ("all_right", "mixed", "all_wrong")


@dataclass(frozen=True)
class Learning:
    """Every metric as (step, value) pairs, steps ascending, values finite."""

    series: dict[str, Series] = field(default_factory=dict)
    torn: int = 0

    @property
    def steps(self) -> int:
        """The last training step seen (0: none; step 0 is the validation before training)."""
        return max((points[-1][0] for points in self.series.values()), default=0)

    def get(self, name: str) -> Series:
        return self.series.get(name, [])

    def validation(self) -> dict[str, Series]:
        """The validation accuracies, by verl's full name for them."""
        return {
            name: points
            for name, points in sorted(self.series.items())
            if name.startswith("val-core/") and "acc/mean@" in name
        }

    def shares(self, route: str) -> dict[str, Series]:
        """The shares of groups all right, mixed and all wrong on the steps that have all three.

        Each step is divided by its sum, so counts and shares draw alike; a step without a group of
        that route is left out.
        """
        parts = {part: dict(self.get(f"pivottrace/{route}/{part}")) for part in PARTS}
        steps = sorted(set.intersection(*(set(values) for values in parts.values())))
        totals = {step: sum(parts[part][step] for part in PARTS) for step in steps}
        return {
            part: [(step, parts[part][step] / totals[step]) for step in steps if totals[step] > 0]
            for part in PARTS
        }


def read_metrics(path: Path) -> Learning:
    """Read a metrics file; a file that is not there is an empty `Learning`."""
    if not path.exists():
        return Learning()
    by_name: dict[str, dict[int, float]] = {}
    torn = 0
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            step, data = int(record["step"]), dict(record["data"])
        except (ValueError, KeyError, TypeError):
            torn += 1
            continue
        for name, value in data.items():
            if isinstance(value, int | float) and math.isfinite(value):
                by_name.setdefault(str(name), {})[step] = float(value)
    return Learning({name: sorted(points.items()) for name, points in by_name.items()}, torn)


def smooth(points: Series, width: int = 5) -> Series:
    """A centred mean over `width` neighbouring points (fewer at the ends)."""
    half = width // 2
    out: Series = []
    for i, (step, _) in enumerate(points):
        near = [value for _, value in points[max(0, i - half) : i + half + 1]]
        out.append((step, sum(near) / len(near)))
    return out
