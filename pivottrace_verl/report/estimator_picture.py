"""The estimator report as one picture: a self-contained SVG of points and intervals.

Contract: one row an estimator, the strongest first, and one panel a statistic; a thin line marks
what a random order gives. The style is plain enough for viewers that know no CSS variables.
"""

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree as ET

from pivottrace_verl.report.svg import Plot, number, span, ticks

PANELS = {
    "auroc": "AUROC: majority wrong",
    "auroc_within_length": "AUROC within length terciles",
    "spearman": "Spearman with the pass rate",
    "aurc": "area under risk-coverage",
}
STYLE = """
text { fill: #59616b; font-size: 12px }
.strong { fill: #1a1d21; font-weight: 600 }
.page { fill: #ffffff }
.gridline { stroke: #d9dde3; fill: none }
.threshold { stroke: #1a1d21; stroke-width: 1.5; stroke-dasharray: 3 3 }
.line.signal, .line.pivot { stroke-width: 2.5; stroke-linecap: round; fill: none }
.signal { stroke: #59616b; fill: #59616b }
.pivot { stroke: #c75200; fill: #c75200 }
"""
_ROW, _NAMES, _PANEL, _TOP, _BOTTOM = 24, 216, 210, 44, 52


def picture(report: Mapping[str, Any]) -> bytes:
    """`estimator_report.assess` -> an SVG file."""
    rows = report["estimators"]
    width = _NAMES + _PANEL * len(PANELS) + 10
    height = _TOP + _ROW * len(rows) + _BOTTOM
    canvas = Plot(f"Estimators on {report['probes']} probes", (0, 1), (0, 1), width, height)
    canvas.root.set("xmlns", "http://www.w3.org/2000/svg")
    canvas.root.set("font-family", "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif")
    ET.SubElement(canvas.root, "style").text = STYLE
    page = {"class": "page", "width": str(width), "height": str(height)}
    ET.SubElement(canvas.root, "rect", page)
    best = (report["recommended"] or {}).get("estimator")
    for i, row in enumerate(rows):
        y = _TOP + _ROW * (i + 0.5) + 4
        arrow = {"higher": " \u2191", "lower": " \u2193"}.get(row["direction"], "")
        weight = "strong" if row["estimator"] == best else "tick"
        canvas.label(_NAMES - 12, y, row["estimator"] + arrow, weight, "end")
        if not row["measured"]:
            canvas.label(_NAMES + 6, y, "not scored", "tick")
    for i, (statistic, title) in enumerate(PANELS.items()):
        panel = _panel(report, statistic, title, height)
        panel.root.set("x", str(_NAMES + i * _PANEL))
        canvas.root.append(panel.root)
    level = report["bootstrap"]["level"]
    canvas.label(
        12,
        height - 6,
        f"Point and {level:.0%} bootstrap interval over {report['probes']} probes; dashed: a "
        "random order. Arrow: which end is uncertain. Bold: recommended; orange: pivots.",
        "tick",
    )
    drawn: bytes = ET.tostring(canvas.root, encoding="utf-8", xml_declaration=True)
    return drawn


def _panel(report: Mapping[str, Any], statistic: str, title: str, height: int) -> Plot:
    rows = report["estimators"]
    chance = dict(report["random_order"] or {})
    chance["auroc_within_length"] = chance.get("auroc")
    known = [v for row in rows for v in row[statistic].values() if v is not None]
    line = chance.get(statistic)
    low, high = span([*known, *([] if line is None else [line])])
    room = 0.04 * (high - low)
    plot = Plot(
        title, (low - room, high + room), (-0.5, len(rows) - 0.5), _PANEL, height,
        left=6, right=14, top=_TOP, bottom=_BOTTOM,
    )  # fmt: skip
    plot.label(plot.left, 24, title, "strong")
    base = height - _BOTTOM
    for t in ticks(*plot.x, 4):
        x = plot.px(t)
        plot.rule(t, "gridline")
        plot.label(x, base + 16, number(t), "tick", "middle")
    if line is not None:
        plot.rule(line, "threshold")
    for i, row in enumerate(rows):
        y, value = len(rows) - 1 - i, row[statistic]
        if value["point"] is None:
            continue
        kind = "pivot" if row["estimator"].startswith("pivot") else "signal"
        if value["low"] is not None:
            plot.line([value["low"], value["high"]], [y, y], kind)
        plot.point(value["point"], y, kind, f"{row['estimator']}: {value['point']:.3f}")
    return plot
