"""Curves of runs over their steps, as SVG for an HTML page. Imports no torch."""

from __future__ import annotations

import io
import threading
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

from launcher.run.curves import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = (
    "#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd",
    "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#7f7f7f",
)  # fmt: skip
DASHES = ("-", "--", ":", "-.")
_RC_LOCK = threading.Lock()  # matplotlib's options belong to the process, not to a thread


@dataclass(frozen=True)
class Curve:
    """One metric of one run."""

    points: list[Point]
    dots: list[Point]  # drawn as single dots: evaluations
    # If there are any, they are drawn as the curve, and the points in a faint color.
    smoothed: list[Point] = field(default_factory=list)


def line_style(index: int) -> tuple[str, str]:
    """Color and dashes of a run in every chart, by the index of the run. Repeats after 40 runs."""
    styles = list(product(DASHES, COLORS))
    dashes, color = styles[index % len(styles)]
    return color, dashes


def chart(title: str, curves: list[Curve]) -> str:
    """An <svg> element with one curve for each run. It contains no text of a run: names are in the
    page's legend, where they are escaped."""
    import matplotlib
    from matplotlib.figure import Figure

    # Text remains text. The salt makes the names of clip paths unique on a page and reproducible.
    options: Any = {"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}
    with _RC_LOCK, matplotlib.rc_context(options):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.subplots()
        for index, curve in enumerate(curves):
            _draw(axes, curve, *line_style(index))
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("step")
        axes.ticklabel_format(axis="y", scilimits=(-3, 6), useOffset=False)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    return "<svg " + buffer.getvalue().partition("<svg ")[2]  # without prolog and doctype


def _draw(axes: Axes, curve: Curve, color: str, dashes: str) -> None:
    points = curve.points
    if curve.smoothed:
        axes.plot(*_columns(points), color=color, alpha=0.25, linewidth=0.8)
        points = curve.smoothed
    marker = "o" if len(points) == 1 else None
    axes.plot(*_columns(points), dashes, color=color, linewidth=1.4, marker=marker)
    axes.plot(*_columns(curve.dots), "o", color=color, markersize=5, markeredgecolor="black")


def _columns(points: list[Point]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]
