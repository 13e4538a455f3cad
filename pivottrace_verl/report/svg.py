"""A small plot in SVG: one pair of linear axes, drawn with the page's own style sheet.

Contract: every mark carries a CSS class and no colour, so one drawing serves light, dark and print;
text and attributes are escaped by ElementTree, so any string may be a label or a tooltip; numbers
that are not finite are gaps, never errors. Coordinates passed in are data units, except in `Plot`'s
own margins, which are SVG units (one unit is one CSS pixel at full width).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from xml.etree import ElementTree as ET

from markupsafe import Markup

Range = tuple[float, float]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) inside [low, high], about `about` of them."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low]
    raw = (high - low) / max(about, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, last + 1)]


def number(value: float) -> str:
    """A tick's text: no exponent for everyday sizes, no trailing zeros."""
    return f"{value:.6g}"


def span(values: Sequence[float], floor: float | None = None, ceil: float | None = None) -> Range:
    """A range that holds every finite value, widened to `floor` and `ceil` and never empty."""
    finite = [float(v) for v in values if math.isfinite(v)]
    low = min([*finite, *([] if floor is None else [floor])], default=0.0)
    high = max([*finite, *([] if ceil is None else [ceil])], default=1.0)
    if high > low:
        return low, high
    room = abs(low) * 0.1 or 1.0
    return low - room, high + room


@dataclass
class Plot:
    """One drawing. Make it, draw on it in order (later is on top), then call `markup()`."""

    alt: str
    x: Range
    y: Range
    width: int = 420
    height: int = 240
    left: int = 46
    right: int = 14
    top: int = 14
    bottom: int = 38
    root: ET.Element = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.root = ET.Element(
            "svg",
            {
                "viewBox": f"0 0 {self.width} {self.height}",
                "role": "img",
                "aria-label": self.alt,
                "class": "plot",
                # The style sheet scales the drawing down; without it, it has its natural size.
                "width": str(self.width),
                "height": str(self.height),
            },
        )

    def px(self, x: float) -> float:
        low, high = self.x
        return self.left + (x - low) / (high - low) * (self.width - self.left - self.right)

    def py(self, y: float) -> float:
        low, high = self.y
        return (
            self.height
            - self.bottom
            - (y - low) / (high - low) * (self.height - self.top - self.bottom)
        )

    def _add(self, tag: str, cls: str, **attributes: float | str) -> ET.Element:
        text = {
            key.replace("_", "-"): value if isinstance(value, str) else f"{value:.2f}"
            for key, value in attributes.items()
        }
        return ET.SubElement(self.root, tag, {"class": cls, **text})

    def label(self, px: float, py: float, text: str, cls: str = "", anchor: str = "start") -> None:
        """Text at SVG units (not data units)."""
        self._add("text", cls, x=px, y=py, text_anchor=anchor).text = text

    def axes(
        self,
        x_label: str,
        y_label: str,
        percent: bool = False,
        whole_x: bool = False,
        about: int = 5,
    ) -> None:
        """Grid lines, about `about` tick texts on y, axis names; `percent`: y in per cent."""
        x_ticks = ticks(*self.x)
        if whole_x:
            x_ticks = [t for t in x_ticks if t == round(t)]
        for t in ticks(*self.y, about):
            y = self.py(t)
            self._add("line", "gridline", x1=self.left, x2=self.width - self.right, y1=y, y2=y)
            text = f"{number(100 * t)}%" if percent else number(t)
            self.label(self.left - 6, y + 4, text, "tick", "end")
        base = self.height - self.bottom
        self._add("line", "axis", x1=self.left, x2=self.width - self.right, y1=base, y2=base)
        for t in x_ticks:
            self._add("line", "axis", x1=self.px(t), x2=self.px(t), y1=base, y2=base + 4)
            self.label(self.px(t), base + 16, number(t), "tick", "middle")
        middle = (self.left + self.width - self.right) / 2
        self.label(middle, self.height - 5, x_label, "name", "middle")
        if y_label:
            mid_y = (self.top + base) / 2
            turned = f"translate(12 {mid_y:.2f}) rotate(-90)"
            self._add("text", "name", text_anchor="middle", transform=turned).text = y_label

    def band(self, low: float, high: float, cls: str) -> None:
        """A shaded strip over the full height, from x = `low` to x = `high`."""
        x0, x1 = self.px(max(low, self.x[0])), self.px(min(high, self.x[1]))
        if x1 > x0:
            tall = self.height - self.top - self.bottom
            self._add("rect", cls, x=x0, y=float(self.top), width=x1 - x0, height=tall)

    def rule(self, x: float, cls: str) -> None:
        """A vertical line over the full height."""
        px = self.px(x)
        self._add("line", cls, x1=px, x2=px, y1=self.top, y2=self.height - self.bottom)

    def level(self, y: float, text: str, cls: str) -> None:
        """A horizontal line over the full width, named at its right end."""
        py = self.py(y)
        self._add("line", cls, x1=self.left, x2=self.width - self.right, y1=py, y2=py)
        self.label(self.width - self.right + 4, py + 4, text, "tick")

    def line(self, xs: Sequence[float], ys: Sequence[float], cls: str) -> None:
        """A polyline; a value that is not finite breaks it."""
        path, pen_down = [], False
        for x, y in zip(xs, ys, strict=True):
            if not (math.isfinite(x) and math.isfinite(y)):
                pen_down = False
                continue
            path.append(f"{'L' if pen_down else 'M'}{self.px(x):.1f} {self.py(y):.1f}")
            pen_down = True
        if path:
            self._add("path", f"line {cls}", d="".join(path))

    def area(
        self, xs: Sequence[float], low: Sequence[float], high: Sequence[float], cls: str
    ) -> None:
        """The region between two lines (all values finite)."""
        there = [f"{self.px(x):.1f} {self.py(y):.1f}" for x, y in zip(xs, high, strict=True)]
        back = [f"{self.px(x):.1f} {self.py(y):.1f}" for x, y in zip(xs, low, strict=True)]
        self._add("path", f"area {cls}", d="M" + "L".join(there + back[::-1]) + "Z")

    def point(self, x: float, y: float, cls: str, title: str = "", shape: str = "dot") -> None:
        """One mark with a tooltip; `shape` is dot or cross (shape says what colour says)."""
        px, py = self.px(x), self.py(y)
        if shape == "cross":
            d = f"M{px - 3.5:.1f} {py - 3.5:.1f}l7 7m0 -7l-7 7"
            mark = self._add("path", f"mark {cls}", d=d)
        else:
            mark = self._add("circle", f"mark {cls}", cx=px, cy=py, r=3.8)
        if title:
            ET.SubElement(mark, "title").text = title

    def markup(self) -> Markup:
        """The drawing as markup that a template may place as it is."""
        # ElementTree escaped every text and attribute on the way out.
        return Markup(ET.tostring(self.root, encoding="unicode"))
