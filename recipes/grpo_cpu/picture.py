"""The recipe's curves as one self-contained SVG: accuracy by training step and by labels.

Contract: a thin line a seed, a thick one for their mean; a dashed line is the final accuracy of
full supervision. The style is plain enough for viewers that know no CSS variables.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

sys.path.insert(0, str(Path(__file__).resolve().parent))
from arms import ARMS, final

from pivottrace_verl.report.svg import Plot, span

STYLE = """
text { fill: #59616b; font-size: 12px }
.strong { fill: #1a1d21; font-weight: 600 }
.page { fill: #ffffff }
.gridline { stroke: #d9dde3; fill: none }
.axis { stroke: #59616b; fill: none }
.line { stroke-width: 2.5; stroke-linejoin: round }
.threshold { stroke: #1a1d21; stroke-width: 1.5; stroke-dasharray: 3 3 }
.seed { stroke-width: 1; opacity: 0.45 }
.full { stroke: #1a1d21; fill: #1a1d21 }
.pivottrace { stroke: #c75200; fill: #c75200 }
.random { stroke: #1f6fb2; fill: #1f6fb2 }
.votes { stroke: #6b8e23; fill: #6b8e23 }
path.line { fill: none }
"""
_PANEL, _HEIGHT, _LEGEND = 430, 300, 32
AXES = {"step": "GRPO steps", "labels": "labels asked for so far"}


def picture(summary: Mapping[str, Any]) -> bytes:
    """A run's summary -> an SVG file."""
    width, height = _PANEL * len(AXES), _HEIGHT + _LEGEND
    canvas = Plot("Learning curves of the arms", (0, 1), (0, 1), width, height)
    canvas.root.set("xmlns", "http://www.w3.org/2000/svg")
    canvas.root.set("font-family", "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif")
    ET.SubElement(canvas.root, "style").text = STYLE
    page = {"class": "page", "width": str(width), "height": str(height)}
    ET.SubElement(canvas.root, "rect", page)
    curves = curves_of(summary)
    for i, axis in enumerate(AXES):
        panel = _panel(curves, axis)
        panel.root.set("x", str(i * _PANEL))
        canvas.root.append(panel.root)
    slot = (width - 40) / len(ARMS)
    for i, arm in enumerate(curves):
        x, y = 24 + i * slot, _HEIGHT + 18
        mark = {"x1": str(x), "x2": str(x + 18), "y1": str(y - 4), "y2": str(y - 4)}
        ET.SubElement(canvas.root, "line", {"class": f"line {arm}", **mark})
        canvas.label(x + 24, y, ARMS[arm].title, "strong")
    drawn: bytes = ET.tostring(canvas.root, encoding="utf-8", xml_declaration=True)
    return drawn


def curves_of(summary: Mapping[str, Any]) -> dict[str, list[list[dict[str, Any]]]]:
    """Arm -> the learning curves of its seeds, in the order of the summary."""
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for row in summary["arms"]:
        found.setdefault(row["arm"], []).append(row["curve"])
    return found


def mean_curve(curves: Sequence[Sequence[Mapping[str, Any]]], name: str) -> list[float]:
    """The mean over seeds of one column, validation by validation."""
    columns = zip(*([point[name] for point in points] for points in curves), strict=True)
    return [sum(column) / len(column) for column in columns]


def _panel(curves: Mapping[str, list[list[dict[str, Any]]]], axis: str) -> Plot:
    points = [point for seeds in curves.values() for seed in seeds for point in seed]
    low, high = span([point["three"] for point in points], floor=0.0)
    plot = Plot(
        f"Validation accuracy by {AXES[axis]}",
        span([point[axis] for point in points], floor=0),
        (low, high + 0.06 * (high - low)),
        _PANEL, _HEIGHT,
    )  # fmt: skip
    plot.axes(AXES[axis], "validation accuracy", percent=True, whole_x=True)
    if "full" in curves:
        target = sum(map(final, curves["full"])) / len(curves["full"])
        plot.line(plot.x, (target, target), "threshold")
    for arm, seeds in curves.items():
        for seed in seeds if len(seeds) > 1 else []:
            plot.line([p[axis] for p in seed], [p["three"] for p in seed], f"seed {arm}")
        xs, ys = mean_curve(seeds, axis), mean_curve(seeds, "three")
        plot.line(xs, ys, arm)
        for x, y in zip(xs, ys, strict=True):
            plot.point(x, y, arm, f"{ARMS[arm].title}: {y:.1%}")
    return plot
