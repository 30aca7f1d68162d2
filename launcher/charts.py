"""Curves of runs over their steps, as SVG to stand inside a page. Imports no torch."""

from __future__ import annotations

import io
import threading
from dataclasses import dataclass
from itertools import product
from typing import Any

Point = tuple[int, float]  # step, value
POINTS = 1500  # of one curve; more would only make the page larger
COLOURS = (
    "#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd",
    "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#7f7f7f",
)  # fmt: skip
_OPTIONS = threading.Lock()
DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Curve:
    """One figure of one run."""

    points: list[Point]
    dots: list[Point]  # drawn by themselves: evaluations
    smoothed: bool = False  # a moving average, and the points themselves faint


def style(number: int) -> tuple[str, str]:
    """Colour and dashes of the run `number`, in every chart; after 40 they come again."""
    looks = list(product(DASHES, COLOURS))
    dashes, colour = looks[number % len(looks)]
    return colour, dashes


def chart(title: str, curves: list[Curve]) -> str:
    """An <svg> element with one curve for each run. No text of a run is in it: names stand in the
    page's legend, where they are escaped."""
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text; the salt keeps names of clip paths apart in one page, and the same each time.
    options: Any = {"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}
    with _OPTIONS, matplotlib.rc_context(options):  # which are the process's own, not a thread's
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.subplots()
        for number, curve in enumerate(curves):
            _draw(axes, curve, *style(number))
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("step")
        axes.ticklabel_format(axis="y", scilimits=(-3, 6), useOffset=False)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        written = io.StringIO()
        unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(written, format="svg", metadata=unsaid)
    return "<svg " + written.getvalue().partition("<svg ")[2]  # without prologue and doctype


def smooth(values: list[float], weight: float = 0.8) -> list[float]:
    """Exponential moving average without the pull towards zero at the start (as Adam does it)."""
    smoothed, average = [], 0.0
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**count))
    return smoothed


def _draw(axes: Any, curve: Curve, colour: str, dashes: str) -> None:
    points = curve.points
    if curve.smoothed and points:
        axes.plot(*_columns(_thinned(points)), color=colour, alpha=0.25, linewidth=0.8)
        average = smooth([value for _, value in points])
        points = [(step, value) for (step, _), value in zip(points, average, strict=True)]
    mark = "o" if len(points) == 1 else None
    axes.plot(*_columns(_thinned(points)), dashes, color=colour, linewidth=1.4, marker=mark)
    axes.plot(*_columns(curve.dots), "o", color=colour, markersize=5, markeredgecolor="black")


def _thinned(points: list[Point]) -> list[Point]:
    """At most POINTS of them at equal distances, the last among them."""
    every = -(-len(points) // POINTS)
    return points if every <= 1 else points[::-1][::every][::-1]


def _columns(points: list[Point]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]
