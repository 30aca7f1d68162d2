"""`shardway report`: runs side by side in one page that needs nothing else. Imports no torch."""

from __future__ import annotations

import argparse
import html
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import charts, manifest, overview, sweep, train
from launcher.charts import Curve, Point
from launcher.config import Config, store
from launcher.errors import UserError
from launcher.run_dir import RunDir

ABOUT = """\
Write one HTML page with the curves of runs over their steps, a table of the runs, and the settings
in which they differ. The page loads nothing and can be sent by mail.

    shardway report runs/first                          writes runs/first/report.html
    shardway report runs/a runs/b --output report.html  one above the other in every chart
    shardway report runs/sweep --output sweep.html      all runs of a sweep
"""
BEGINS = "<!doctype html>\n<!-- written by shardway report -->\n"  # by which a report is known
CHARTS = (  # title, field of metrics.jsonl, divisor
    ("loss per target token", "loss", 1.0),
    ("learning rate", "learning_rate", 1.0),
    ("tokens / s", "tokens_per_second", 1.0),
    ("peak memory of rank 0, GB", "peak_memory_bytes", 1e9),
    ("gradient norm", "grad_norm", 1.0),
)
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
class Told:
    """What the folder of a run says."""

    name: str
    run: RunDir
    config: Config
    records: list[dict[str, Any]]

    def points(self, field: str, divisor: float = 1.0) -> list[Point]:
        """(step, value) of each line that has a number there."""
        return [
            (int(line["step"]), line[field] / divisor)
            for line in self.records
            if field in line and isinstance(line[field], (int, float))
        ]


def main() -> None:
    """The command line. Exits with 2 where there is nothing to show, or no place for it."""
    parser = argparse.ArgumentParser(
        prog="shardway report",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run or a sweep")
    parser.add_argument("--output", type=Path, metavar="FILE", help="RUN/report.html for one run")
    parser.add_argument("--overwrite", action="store_true", help="even where FILE is no report")
    words = parser.parse_args()
    try:
        told = read(words.runs)
        output = _place(words.output, told, words.overwrite)
        manifest.write_text(output, page(told))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(train.UNUSABLE_CONFIGURATION)
    except OSError as error:
        print(f"the report cannot be written: {error}", file=sys.stderr)
        sys.exit(train.UNUSABLE_CONFIGURATION)
    print(f"report: {output}")


def read(paths: list[Path]) -> list[Told]:
    """The runs that `paths` name, those of sweeps in their order, each once.

    Raises UserError for a folder that is neither a run nor a sweep, and where no step was logged.
    """
    runs = list(dict.fromkeys(run for path in paths for run in _runs(path.absolute())))
    found = [
        Told(name, run.newest(), _config(run), overview.metrics(run))
        for name, run in zip(_names(runs), runs, strict=True)
    ]
    if not any(told.points("loss") for told in found):
        raise UserError(f"{', '.join(map(str, paths))}: no step has been logged yet")
    return found


def page(told: list[Told]) -> str:
    """The whole page."""
    title = html.escape(told[0].name if len(told) == 1 else f"{len(told)} runs")
    return "\n".join(
        [
            f'{BEGINS}<html lang="en"><head><meta charset="utf-8">',
            # Should anything of a run ever get through unescaped, it is not executed or loaded.
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width">',
            f"<title>{title} · Shardway</title><style>{STYLE}</style></head><body>",
            f"<h1>{title}</h1>",
            body(told),
            "</body></html>\n",
        ]
    )


def body(told: list[Told]) -> str:
    """Table of runs, curves and settings, to stand in a page that has STYLE."""
    drawn = [
        charts.chart(heading, [_curve(each, field, divisor) for each in told])
        for heading, field, divisor in CHARTS
        if any(each.points(field) for each in told)
    ]
    return "\n".join(
        [
            table([_row(number, each) for number, each in enumerate(told)]),
            f'<h2>Curves</h2><div class="charts">{"".join(drawn)}</div>',
            "<p>Loss and gradient norm: faint as logged, strong their moving average (weight 0.8). "
            "Dots: the evaluation loss. Tokens/s are of all ranks.</p>",
            _settings(told),
        ]
    )


def _runs(path: Path) -> list[RunDir]:
    if sweep.is_sweep(path):
        if not (found := sweep.elements(path)):
            raise UserError(f"{path} is a sweep of which no run has begun")
        return found
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} is neither a run folder (it has no config.yaml) nor a sweep")
    return [RunDir(path)]


def _names(runs: list[RunDir]) -> list[str]:
    """Each run's folder, as far as it is not common to all."""
    common = Path(os.path.commonpath([run.path.parent for run in runs]))
    names = [str(run.path.relative_to(common)) for run in runs]
    return [name.encode("utf-8", "backslashreplace").decode() for name in names]


def _config(run: RunDir) -> Config:
    try:
        return store.load(run.config)
    except UserError as error:
        raise UserError(f"{run.config} cannot be read by this version. {error}") from error


def _place(output: Path | None, told: list[Told], overwrite: bool) -> Path:
    """Where the page goes. Raises UserError where it would replace something else."""
    if output is None:
        if len(told) > 1:
            raise UserError(f"these are {len(told)} runs, in no one's folder → --output FILE")
        output = told[0].run.path / "report.html"
    if not output.parent.is_dir():
        raise UserError(f"the folder of --output {output} is not there → make it, or name another")
    if output.is_dir():
        raise UserError(f"--output {output} is a folder → --output {output / 'report.html'}")
    if output.exists() and not overwrite:
        with output.open("rb") as file:
            if file.read(len(BEGINS)) != BEGINS.encode():
                raise UserError(f"{output} is no report → another --output, or --overwrite")
    return output


def _curve(told: Told, field: str, divisor: float) -> Curve:
    dots = told.points("eval_loss") if field == "loss" else []
    return Curve(told.points(field, divisor), dots, smoothed=field in ("loss", "grad_norm"))


def _row(number: int, told: Told) -> dict[str, str]:
    """Of the table of runs; values are HTML."""
    config, steps = told.config, told.points("loss")
    evaluated = [value for _, value in told.points("eval_loss")]
    rates = [value for _, value in told.points("tokens_per_second")]
    peaks = [value for _, value in told.points("peak_memory_bytes", 1e9)]
    total = config.training.max_steps
    values = {
        "state": overview.state(told.run, None),
        "model": config.model.name,
        "method": config.method.name,
        "strategy": config.strategy.name,
        "precision": config.precision.name,
        "steps": f"{steps[-1][0] if steps else 0}{f' / {total}' if total else ''}",
        "loss": f"{steps[-1][1]:.4f}" if steps else "",
        "eval loss": f"{evaluated[-1]:.4f}" if evaluated else "",
        "best": f"{min(evaluated):.4f}" if evaluated else "",
        "tokens/s (median)": f"{statistics.median(rates):,.0f}" if rates else "",
        "peak GB": f"{max(peaks):.2f}" if peaks else "",
        "time in steps": _clock(_seconds(told)) if steps else "",
    }
    sample = _sample(*charts.style(number))
    escaped = {key: html.escape(value) for key, value in values.items()}
    return {"run": f"{sample}{html.escape(told.name)}", **escaped}


def _sample(colour: str, dashes: str) -> str:
    """A piece of the line that a run has in the charts."""
    pattern = {"-": "none", "--": "6 3", ":": "2 2", "-.": "6 2 2 2"}[dashes]
    return (
        f'<svg class="line" viewBox="0 0 32 8"><path d="M0 4H32" stroke="{colour}" '
        f'stroke-width="3" stroke-dasharray="{pattern}"/></svg>'
    )


def _seconds(told: Told) -> float:
    """That its steps took, without evaluation, saving and pauses between attempts."""
    tokens, rates = told.points("tokens"), told.points("tokens_per_second")
    if not tokens or len(tokens) != len(rates):
        return 0.0
    # A run that goes on from another's checkpoint begins with that one's tokens.
    before = 0.0 if tokens[0][0] == 1 else tokens[0][1]
    seconds = 0.0
    for (_, count), (_, rate) in zip(tokens, rates, strict=True):
        seconds += (count - before) / rate if rate else 0.0
        before = count
    return seconds


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _settings(told: list[Told]) -> str:
    """The settings that differ between several runs; all those of one."""
    if len(told) == 1:
        text = html.escape(store.dump(told[0].config))
        return (
            f"<h2>Settings</h2><details><summary>config.yaml</summary><pre>{text}</pre></details>"
        )
    apart = sweep.differing([each.config for each in told])
    if not apart[0]:
        return "<h2>Settings</h2><p>All runs have the same settings.</p>"
    rows = [
        {"setting": html.escape(key)}
        | {
            html.escape(each.name): html.escape(of[key])
            for each, of in zip(told, apart, strict=True)
        }
        for key in apart[0]
    ]
    return f"<h2>Settings that differ</h2>{table(rows)}"


def table(rows: list[dict[str, str]]) -> str:
    """An HTML table of `rows`, whose keys and values are HTML."""
    head = "".join(f"<th>{key}</th>" for key in rows[0])
    body = "".join(
        f"<tr>{''.join(f'<td>{value}</td>' for value in row.values())}</tr>\n" for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>'


if __name__ == "__main__":
    main()
