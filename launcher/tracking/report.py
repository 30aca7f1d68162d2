"""Runs side by side in one HTML page that loads nothing else. Imports no torch."""

from __future__ import annotations

import dataclasses
import html
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from launcher.config import Config, store
from launcher.errors import UserError
from launcher.folders.links import LeadsOut
from launcher.folders.run import RunDir
from launcher.run import sweep
from launcher.run.curves import MAX_POINTS, RunMetrics
from launcher.run.metrics import format_number
from launcher.run.status import DAMAGED, format_duration, run_state
from launcher.tracking import svg
from launcher.tracking.svg import Curve

MIN_POINTS = 100  # of a curve
POINTS_PER_CHART = 40_000  # about: curves of many runs have fewer points each
HEADER = "<!doctype html>\n<!-- written by shardway report -->\n"  # identifies a report
CHARTS = (  # title, field of metrics.jsonl, divisor
    ("loss per target token", "loss", 1.0),
    ("learning rate", "learning_rate", 1.0),
    ("tokens / s", "tokens_per_second", 1.0),
    ("peak memory of rank 0, GB", "peak_memory_bytes", 1e9),
    ("gradient norm", "grad_norm", 1.0),
)
T = TypeVar("T")
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 84rem; margin: 2rem auto;
  padding: 0 1.5rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem; }
.charts svg { width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right;
  white-space: nowrap; font-variant-numeric: tabular-nums; }
th { font-weight: 600; } th:first-child, td:first-child { text-align: left; }
.line { display: inline-block; width: 2rem; margin-right: .5rem; vertical-align: middle; }
p, pre { color: #555; } pre { overflow-x: auto; }
"""


@dataclass(frozen=True)
class LoadedRun:
    """A run as read from its folder."""

    name: str
    run: RunDir
    config: Config | None  # None: config.yaml cannot be read
    metrics: RunMetrics
    state: str
    damage: tuple[str, ...]  # what cannot be read, and why


def read_runs(paths: list[Path]) -> list[LoadedRun]:
    """The runs in `paths`, each once. The runs of a sweep keep their order.

    Raises UserError for a folder that is neither a run nor a sweep, and if no step was logged.
    """
    runs = list(dict.fromkeys(run for path in paths for run in _find_runs(path.absolute())))
    max_points = min(MAX_POINTS, max(MIN_POINTS, POINTS_PER_CHART // len(runs)))
    loaded_runs = [
        _load(name, run.newest_attempt(), max_points)
        for name, run in zip(_names(runs), runs, strict=True)
    ]
    if not any(loaded.metrics.points("loss") for loaded in loaded_runs):
        damage = "; ".join(line for loaded in loaded_runs for line in loaded.damage)
        raise UserError(f"{', '.join(map(str, paths))}: {damage or 'no step has been logged yet'}")
    return loaded_runs


def _load(name: str, run: RunDir, max_points: int) -> LoadedRun:
    damage: list[str] = []

    def read(call: Callable[[], T]) -> T | None:
        try:
            return call()
        except UserError as error:
            damage.append(str(error))
            return None

    config = read(lambda: _read_config(run))
    state = read(lambda: run_state(run, None)) or DAMAGED
    metrics = read(lambda: RunMetrics(run.metrics, max_points).update())
    if metrics is None:
        metrics = RunMetrics(run.path, max_points)  # without a point
    if metrics.bad_lines:
        damage.append(f"{metrics.path}: {metrics.bad_lines:,} lines are not records and left out")
    return LoadedRun(name, run, config, metrics, state, tuple(damage))


def _read_config(run: RunDir) -> Config:
    try:
        return store.load(run.config)
    except LeadsOut:
        raise
    except UserError as error:
        raise UserError(f"{run.config} cannot be read by this version. {error}") from error


def render_page(runs: list[LoadedRun]) -> str:
    """The complete HTML page."""
    title = html.escape(runs[0].name if len(runs) == 1 else f"{len(runs)} runs")
    return "\n".join(
        [
            f'{HEADER}<html lang="en"><head><meta charset="utf-8">',
            # If text of a run were ever not escaped, the browser would not execute or load it.
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width">',
            f"<title>{title} · Shardway</title><style>{STYLE}</style></head><body>",
            f"<h1>{title}</h1>",
            render_body(runs),
            "</body></html>\n",
        ]
    )


def render_body(runs: list[LoadedRun]) -> str:
    """The table of runs, the curves and the settings, for a page that contains STYLE."""
    charts = [
        svg.chart(title, [_curve(run, field, divisor) for run in runs])
        for title, field, divisor in CHARTS
        if any(run.metrics.points(field) for run in runs)
    ]
    damage = "".join(f"<p>{html.escape(line)}</p>" for run in runs for line in run.damage)
    return "\n".join(
        [
            render_table([_row(index, run) for index, run in enumerate(runs)]) + damage,
            f'<h2>Curves</h2><div class="charts">{"".join(charts)}</div>',
            "<p>Loss and gradient norm: the faint line is the logged value, the strong line its "
            "moving average over all steps (weight 0.8). Dots: the evaluation loss. Tokens/s: the "
            "sum over all ranks. Of a long curve, the lowest and the highest point of each stretch "
            "are drawn.</p>",
            _render_settings(runs),
        ]
    )


def _find_runs(path: Path) -> list[RunDir]:
    if sweep.is_sweep(path):
        if not (runs := sweep.list_runs(path)):
            raise UserError(f"{path} is a sweep in which no run has started")
        return runs
    if not RunDir(path).has_config:
        raise UserError(f"{path} is neither a run folder (it has no config.yaml) nor a sweep")
    return [RunDir(path)]


def _names(runs: list[RunDir]) -> list[str]:
    """The path of each run's folder, without the part that all of them share."""
    common = Path(os.path.commonpath([run.path.parent for run in runs]))
    names = [str(run.path.relative_to(common)) for run in runs]
    return [name.encode("utf-8", "backslashreplace").decode() for name in names]


def output_path(output: Path | None, runs: list[LoadedRun], overwrite: bool) -> Path:
    """The file to write the page to. Raises UserError if that would replace another file."""
    if output is None:
        if len(runs) > 1:
            raise UserError(f"a report of {len(runs)} runs has no default file → --output FILE")
        output = runs[0].run.path / "report.html"
    if not output.parent.is_dir():
        raise UserError(
            f"the folder of --output {output} does not exist → create it, or choose another"
        )
    if output.is_dir():
        raise UserError(f"--output {output} is a folder → --output {output / 'report.html'}")
    if output.exists() and not overwrite:
        with output.open("rb") as file:
            if file.read(len(HEADER)) != HEADER.encode():
                raise UserError(f"{output} is not a report → another --output, or --overwrite")
    return output


def _curve(loaded: LoadedRun, field: str, divisor: float) -> Curve:
    metrics = loaded.metrics
    dots = metrics.evaluations() if field == "loss" else []
    points = [(step, value / divisor) for step, value in metrics.points(field)]
    return Curve(points, dots, metrics.smoothed(field))


def _row(index: int, loaded: LoadedRun) -> dict[str, str]:
    """A row of the table of runs; the values are HTML."""
    config, metrics = loaded.config, loaded.metrics
    total_steps = config.training.max_steps if config else None
    step = metrics.newest["step"] if metrics.newest else 0
    memory = metrics.peak_memory
    values = {
        "state": loaded.state,
        "model": config.model.name if config else "",
        "method": config.method.name if config else "",
        "strategy": config.strategy.name if config else "",
        "precision": config.precision.name if config else "",
        "steps": f"{step}{f' / {total_steps}' if total_steps else ''}",
        "loss": format_number(metrics.newest, "loss", ".4f"),
        "eval loss": _format(metrics.last_eval_loss, ".4f"),
        "best": _format(metrics.best_eval_loss, ".4f"),
        "tokens/s (median)": _format(metrics.median_rate(), ",.0f"),
        "peak GB": _format(None if memory is None else memory / 1e9, ".2f"),
        "time in steps": format_duration(metrics.seconds_in_steps) if metrics.newest else "",
    }
    sample = _line_sample(*svg.line_style(index))
    escaped = {key: html.escape(value) for key, value in values.items()}
    return {"run": f"{sample}{html.escape(loaded.name)}", **escaped}


def _format(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _line_sample(color: str, dashes: str) -> str:
    """A short piece of a run's line in the charts."""
    pattern = {"-": "none", "--": "6 3", ":": "2 2", "-.": "6 2 2 2"}[dashes]
    return (
        f'<svg class="line" viewBox="0 0 32 8"><path d="M0 4H32" stroke="{color}" '
        f'stroke-width="3" stroke-dasharray="{pattern}"/></svg>'
    )


def _render_settings(runs: list[LoadedRun]) -> str:
    """The settings in which several runs differ; all settings of a single run."""
    readable = [(run.name, run.config) for run in runs if run.config is not None]
    if not readable:
        return "<h2>Settings</h2><p>They cannot be read.</p>"
    if len(runs) == 1:
        text = html.escape(store.dump(readable[0][1]))
        return (
            f"<h2>Settings</h2><details><summary>config.yaml</summary><pre>{text}</pre></details>"
        )
    differing = sweep.differing_settings([dataclasses.asdict(config) for _, config in readable])
    if not differing[0]:
        return "<h2>Settings</h2><p>All runs have the same settings.</p>"
    rows = [
        {"setting": html.escape(key)}
        | {
            html.escape(name): html.escape(settings[key])
            for (name, _), settings in zip(readable, differing, strict=True)
        }
        for key in differing[0]
    ]
    return f"<h2>Settings that differ</h2>{render_table(rows)}"


def render_table(rows: list[dict[str, str]]) -> str:
    """An HTML table of `rows`; keys and values are HTML."""
    head = "".join(f"<th>{key}</th>" for key in rows[0])
    body = "".join(
        f"<tr>{''.join(f'<td>{value}</td>' for value in row.values())}</tr>\n" for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>'
