"""The report's charts: each takes numbers and gives a `Chart` (title, drawing, legend, note).

Contract: a chart that has nothing to show has no drawing and a `note` that says what is missing.
One route has one class everywhere (`r-annotate`, `r-self_train`, `r-drop`, `r-review`), so one
colour;
`style.css` gives the colours for light, dark and print.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from pivottrace_verl.report.learning import PARTS, TRAINED_ROUTES, Learning, Series, smooth
from pivottrace_verl.report.svg import Plot, number, span

ROUTES = ("drop", "self_train", "annotate", "review")


@dataclass(frozen=True)
class Chart:
    """`legend` holds (CSS classes of the swatch, text); an empty title is not shown."""

    title: str
    svg: Markup = field(default_factory=Markup)
    legend: list[tuple[str, str]] = field(default_factory=list)
    note: str = ""


def calibration(
    probes: Sequence[Mapping[str, Any]],
    curve: Mapping[str, Any] | None,
    *,
    config: Mapping[str, Any] | None,
    shaded: bool,
) -> Chart:
    """Pass rate over uncertainty rank.

    `probes` have u, pass_rate, majority_right, pt_id; `curve` is a `calibration.Curve` as a dict,
    None if there are too few probes for one; `config` names the levels `mastered` and `trusted`.
    Each sliding mean has the band of its bootstrap interval. The routes are shaded only if triage
    went through (`shaded`).
    """
    if not probes:
        return Chart("", note="No probe has a label yet, so there is no curve.")
    thresholds = {name: (curve or {}).get(name) for name in ("u_low", "u_high")}
    told = [f"{len(probes)} probes, pass rate over uncertainty rank."]
    told += [f"{name} {value:.2f}." for name, value in thresholds.items() if value is not None]
    plot = Plot(
        " ".join(["Calibration curve:", *told]),
        (0, 1),
        (-0.03, 1.03),
        width=860,
        height=390,
        top=44,
        left=56,
        right=92,
    )
    if shaded:
        _shade_routes(plot, thresholds["u_low"], thresholds["u_high"])
    plot.axes("uncertainty u: rank in the pool (0 = surest, 1 = least sure)", "pass rate", True)
    if curve and config:
        for name in ("mastered", "trusted"):
            plot.level(config[name], f"{name} {config[name]:g}", "grid-level")
    for name, value in thresholds.items():
        if value is not None:
            plot.rule(value, "threshold")
            # Texts point away from each other, and near an edge inwards.
            inward = value < 0.12 if name == "u_low" else value <= 0.88
            anchor = "start" if inward else "end"
            plot.label(plot.px(value), 14, f"{name} = {value:.3f}", "strong", anchor)
    if curve:
        for key, cls in (("p", "curve-p"), ("m", "curve-m")):
            us, low = _along(curve, f"{key}_low")
            plot.area(us, low, _along(curve, f"{key}_high")[1], f"interval {cls}")
    for probe in probes:
        right = probe["majority_right"]
        plot.point(
            probe["u"],
            probe["pass_rate"],
            "ok" if right else "bad",
            f"{probe['pt_id']}: u {probe['u']:.3f}, pass rate {probe['pass_rate']:.2f}, "
            f"majority answer {'right' if right else 'wrong or none'}",
            "dot" if right else "cross",
        )
    legend = [
        ("glyph ok", "probe, majority answer right"),
        ("glyph bad", "probe, majority answer wrong or none"),
    ]
    if curve:
        for key, cls, text in (
            ("p", "curve-p", "p(u): pass rate, sliding mean"),
            ("m", "curve-m dashed", "m(u): majority right, sliding mean"),
            ("p_monotone", "curve-p thin", ""),
            ("m_monotone", "curve-m thin", "thin: the monotone fits, which set the thresholds"),
        ):
            plot.line(*_along(curve, key), cls)
            if text:
                legend.append((f"stroke {cls}", text))
        legend.append(
            (
                "swatch interval curve-p",
                f"bands: {curve['level']:.0%} intervals of the sliding means, {curve['draws']} "
                "bootstrap draws",
            )
        )
    note = "" if curve else "Too few probes are labelled for a curve; the points are shown."
    return Chart("", plot.markup(), legend, note)


def _along(curve: Mapping[str, Any], key: str) -> tuple[list[float], list[float]]:
    """(u, values) of a line of the curve. A single window is a point, which a line cannot show: it
    is drawn over all u."""
    us, values = curve["u"], curve[key]
    return (us, values) if len(us) > 1 else ([0.0, 1.0], values * 2)


def _shade_routes(plot: Plot, u_low: float | None, u_high: float | None) -> None:
    high = 1.0 if u_high is None else u_high
    low = min(0.0 if u_low is None else u_low, high)
    edges = {"drop": (0.0, low), "self_train": (low, high), "annotate": (high, 1.0)}
    for route, (x0, x1) in edges.items():
        plot.band(x0, x1, f"band r-{route}")
        if plot.px(x1) - plot.px(x0) > 70:
            plot.label(plot.px((x0 + x1) / 2), 36, route, f"ink r-{route}", "middle")


def lines(
    title: str,
    series: Sequence[tuple[str, str, Series]],
    y_label: str,
    *,
    missing: str,
    floor: float | None = 0.0,
    ceil: float | None = None,
    percent: bool = False,
    averaged: bool = True,
    dots: bool = False,
) -> Chart:
    """Metrics over training steps; `series` holds (class, name, points), empty ones left out.

    With `averaged` and more than ten points the thick line is the mean of five neighbouring steps
    and the thin one the steps themselves. `missing` is the line that stands in for an empty chart.
    """
    shown = [(cls, name, points) for cls, name, points in series if points]
    if not shown:
        return Chart(title, note=missing)
    steps = [float(step) for _, _, points in shown for step, _ in points]
    values = [value for _, _, points in shown for _, value in points]
    ends = "; ".join(
        f"{name} from {number(points[0][1])} at step {points[0][0]} "
        f"to {number(points[-1][1])} at step {points[-1][0]}"
        for _, name, points in shown
    )
    low, high = span(values, floor, ceil)
    plot = Plot(f"{title}: {ends}.", span(steps), (low, high + 0.04 * (high - low)), left=52)
    plot.axes("training step", y_label, percent, whole_x=True)
    any_averaged = False
    for cls, name, points in shown:
        xs, ys = [float(s) for s, _ in points], [v for _, v in points]
        if averaged and len(points) > 10:
            any_averaged = True
            plot.line(xs, ys, f"{cls} thin")
            plot.line(xs, [v for _, v in smooth(points)], cls)
        else:
            plot.line(xs, ys, cls)
        if dots or len(points) == 1:
            for step, value in points:
                plot.point(step, value, f"{cls} solid", f"{name}, step {step}: {number(value)}")
    notes = ["Thick: mean of five steps; thin: each step."] if any_averaged else []
    notes += [f"{name}: not logged." for _, name, points in series if not points]
    legend = [(f"stroke {cls}", name) for cls, name, _ in shown]
    return Chart(title, plot.markup(), legend, " ".join(notes))


def composition(learning: Learning, route: str) -> Chart:
    """Shares of groups that are all right, mixed (these alone teach GRPO) and all wrong."""
    title = f"Groups of {route}"
    shares = learning.shares(route)
    if not shares["mixed"]:
        return Chart(title, note=f"pivottrace/{route}/mixed, all_right and all_wrong: not logged.")
    xs = [float(step) for step, _ in shares["mixed"]]
    last = ", ".join(f"{part.replace('_', ' ')} {shares[part][-1][1]:.0%}" for part in PARTS)
    plot = Plot(f"{title}; at the last step {last}.", span(xs), (0, 1), left=52)
    plot.axes("training step", "share of groups", True, whole_x=True)
    bottom = [0.0] * len(xs)
    if len(xs) == 1:
        xs = [plot.x[0], plot.x[1]]
        bottom = [0.0, 0.0]
    for part in PARTS[::-1]:
        values = [value for _, value in shares[part]]
        values = values * 2 if len(values) == 1 else values
        top = [b + v for b, v in zip(bottom, values, strict=True)]
        plot.area(xs, bottom, top, f"r-{route} {part}")
        bottom = top
    legend = [(f"swatch r-{route} {part}", part.replace("_", " ")) for part in PARTS]
    return Chart(title, plot.markup(), legend)


def learning_curves(learning: Learning) -> list[Chart]:
    """Every chart of the training part, in reading order."""

    def by_route(metric: str) -> list[tuple[str, str, Series]]:
        return [
            (f"r-{route}", route, learning.get(f"pivottrace/{route}/{metric}"))
            for route in TRAINED_ROUTES
        ]

    absent: Callable[[str], str] = lambda name: f"{name}: not logged."  # noqa: E731
    validation = [
        (f"v-{i % 4}", name.removeprefix("val-core/"), points)
        for i, (name, points) in enumerate(learning.validation().items())
    ]
    self_train = "pivottrace/self_train"
    return [
        lines(
            "Validation accuracy",
            validation,
            "accuracy",
            missing=absent("val-core/*/acc/mean@*"),
            percent=True,
            averaged=False,
            dots=True,
        ),
        lines(
            "Training reward by route",
            by_route("reward"),
            "mean reward",
            missing=absent("pivottrace/<route>/reward"),
        ),
        *(composition(learning, route) for route in TRAINED_ROUTES),
        lines(
            "Agreement and pseudo-labels (self_train)",
            [
                ("r-self_train", "agreement", learning.get(f"{self_train}/agreement")),
                (
                    "ok dashed",
                    "pseudo-label accuracy",
                    learning.get(f"{self_train}/pseudo_label_accuracy"),
                ),
            ],
            "share",
            missing=absent(f"{self_train}/agreement"),
            percent=True,
            ceil=1.0,
        ),
        lines(
            "Pivot density by route",
            by_route("pivot_density"),
            "pivots per token",
            missing=absent("pivottrace/<route>/pivot_density"),
        ),
        lines(
            "Rollouts without a trace",
            [("neutral", "capture misses", learning.get("pivottrace/capture/missed"))],
            "rollouts",
            missing=absent("pivottrace/capture/missed"),
            ceil=1.0,
            averaged=False,
        ),
    ]


def signal_strip(values: Sequence[float], pivots: Sequence[int], name: str) -> Markup:
    """The detector's signal along one rollout, a mark on every pivot."""
    finite = [v for v in values if math.isfinite(v)]
    alt = f"{name} along {len(values)} tokens, {len(pivots)} pivots"
    alt += f", between {min(finite):.3f} and {max(finite):.3f}" if finite else ""
    plot = Plot(
        alt,
        (0, max(len(values) - 1, 1)),
        span([*finite, 0.0]),
        width=860,
        height=84,
        left=46,
        top=8,
        bottom=22,
    )
    plot.axes("", "", about=2)
    plot.line([float(i) for i in range(len(values))], list(values), "signal")
    for i in pivots:
        plot.point(i, values[i], "pivot", f"token {i}: {values[i]:.4f}")
    return plot.markup()
