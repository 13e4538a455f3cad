"""The report: one self-contained HTML page on a run, and the same numbers as JSON beside it.

Contract: works at any stage of the run and only reads it; the page asks for nothing over the
network and holds no script; everything that came from prompts, tokens or answers is escaped.

    write_report(RunDir.open("runs/a"))          # runs/a/report.html, runs/a/report.json

`numbers` collects, `verdict` reads the probes, `charts` and `svg` draw, `heatmap` shows pivots,
`learning` reads training's metrics, `template.html.j2` and `style.css` are the page.
"""

from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pivottrace_verl.files import write_bytes_atomic, write_json_atomic
from pivottrace_verl.pool import RunDir
from pivottrace_verl.report import charts
from pivottrace_verl.report.heatmap import heat
from pivottrace_verl.report.numbers import ExampleView, Report, collect, settings

__all__ = ["write_report"]


def write_report(run: RunDir, out: Path | None = None, *, now: datetime | None = None) -> Path:
    """Write the page to `out` (default: report.html in the run directory) and its numbers beside
    it, with the suffix .json. Returns the page's path.

    Raises PivotTraceError if a file of the run is unreadable or was made from something else, or
    if the page cannot be written.
    """
    page = run.path / "report.html" if out is None else Path(out)
    report = collect(run, now or datetime.now(UTC))
    write_bytes_atomic(page, render(report).encode("utf-8", errors="replace"))
    write_json_atomic(page.with_suffix(".json"), report.numbers)
    return page


def render(report: Report) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("pivottrace_verl.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    style = files(__name__).joinpath("style.css").read_text(encoding="utf-8")
    numbers = report.numbers
    calibration = numbers["calibration"]
    drawn: dict[str, Any] = {
        "calibration": charts.calibration(
            calibration["probes"],
            calibration["curve"],
            config=calibration["config"],
            shaded=calibration["triaged"],
        ),
        "learning": charts.learning_curves(report.learning) if report.learning.steps else [],
    }
    return environment.get_template("template.html.j2").render(
        n=numbers,
        # Our own file, and a style element does not decode entities.
        css=Markup(style),
        charts=drawn,
        examples=[_drawn(example, report.tau, numbers) for example in report.examples],
        settings=settings(numbers),
    )


def _drawn(example: ExampleView, tau: float | None, numbers: dict[str, Any]) -> dict[str, Any]:
    trace, name = example.trace, str((numbers["detector"] or {}).get("signal"))
    return {
        "n": example.numbers,
        "prompt": example.prompt,
        "tokens": heat(trace, tau),
        "strip": charts.signal_strip(trace.signal.tolist(), trace.pivots, name),
    }
