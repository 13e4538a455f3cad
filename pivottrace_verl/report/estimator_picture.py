"""The estimator report as one picture: a self-contained SVG of points and intervals.

Contract: one row an estimator, the strongest first, and one panel a statistic; a thin line marks
what a random order gives. Colours are the report page's, light and dark.
"""

from collections.abc import Mapping
from importlib.resources import files
from typing import Any
from xml.etree import ElementTree as ET

from pivottrace_verl.report.svg import Plot, number, span, ticks

PANELS = {
    "auroc": "AUROC: majority wrong",
    "auroc_within_length": "AUROC within length terciles",
    "spearman": "Spearman with the pass rate",
    "aurc": "area under risk-coverage",
}
_ROW, _NAMES, _PANEL, _TOP, _BOTTOM = 24, 170, 210, 44, 52


def picture(report: Mapping[str, Any]) -> bytes:
    """`estimator_report.assess` -> an SVG file."""
    rows = report["estimators"]
    width = _NAMES + _PANEL * len(PANELS) + 10
    height = _TOP + _ROW * len(rows) + _BOTTOM
    canvas = Plot(f"Estimators on {report['probes']} probes", (0, 1), (0, 1), width, height)
    canvas.root.set("xmlns", "http://www.w3.org/2000/svg")
    canvas.root.set("font-family", "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif")
    canvas.root.set("style", "background: var(--page)")
    style = ET.SubElement(canvas.root, "style")
    style.text = files("pivottrace_verl.report").joinpath("style.css").read_text(encoding="utf-8")
    best = (report["recommended"] or {}).get("estimator")
    for i, row in enumerate(rows):
        y = _TOP + _ROW * (i + 0.5) + 4
        arrow = {"higher": " \u2191", "lower": " \u2193"}.get(row["direction"], "")
        name = row["estimator"] + (arrow if row["measured"] else " (not measured)")
        canvas.label(_NAMES - 12, y, name, "strong" if row["estimator"] == best else "tick", "end")
    for i, (statistic, title) in enumerate(PANELS.items()):
        panel = _panel(report, statistic, title, height)
        panel.root.set("x", str(_NAMES + i * _PANEL))
        canvas.root.append(panel.root)
    level = report["bootstrap"]["level"]
    canvas.label(
        _NAMES,
        height - 6,
        f"Point and {level:.0%} bootstrap interval over {report['probes']} probes; dashed: a "
        "random order. Arrow: which end is uncertain. Bold: recommended.",
        "tick",
    )
    drawn: bytes = ET.tostring(canvas.root, encoding="utf-8", xml_declaration=True)
    return drawn


def _panel(report: Mapping[str, Any], statistic: str, title: str, height: int) -> Plot:
    rows = report["estimators"]
    chance = dict(report["random_order"] or {})
    chance["auroc_within_length"] = chance.get("auroc")
    known = [
        value
        for row in rows
        for value in row[statistic].values()
        if value is not None
    ]  # fmt: skip
    line = chance.get(statistic)
    low, high = span([*known, *([] if line is None else [line])])
    room = 0.04 * (high - low)
    plot = Plot(
        title, (low - room, high + room), (-0.5, len(rows) - 0.5), _PANEL, height,
        left=6, right=14, top=_TOP, bottom=_BOTTOM,
    )  # fmt: skip
    plot.label(plot.left, 24, title, "strong")
    base = height - _BOTTOM
    for t in ticks(*plot.x, 3):
        x = plot.px(t)
        plot.line([t, t], plot.y, "gridline")
        plot.label(x, base + 16, number(t), "tick", "middle")
    if line is not None:
        plot.rule(line, "threshold")
    for i, row in enumerate(rows):
        y, value = len(rows) - 1 - i, row[statistic]
        if value["point"] is None:
            continue
        kind = "pivot" if row["estimator"].startswith("pivot") else "signal"
        plot.line([value["low"] or value["point"], value["high"] or value["point"]], [y, y], kind)
        told = f"{row['estimator']}: {value['point']:.3f}"
        plot.point(value["point"], y, f"{kind} solid", told)
    return plot
