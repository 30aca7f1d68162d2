"""A run in HTML: its state, bar and facts, and its curves. Imports no torch."""

from __future__ import annotations

import html
from typing import Any

from launcher import charts, overview
from launcher.charts import Curve
from launcher.cluster import slurm
from launcher.config import Config
from launcher.config.cluster import SlurmConfig
from launcher.run_dir import RunDir
from launcher.ui.words import Words

DRAWN = (  # title, field of metrics.jsonl
    ("loss per target token", "loss"),
    ("learning rate", "learning_rate"),
    ("tokens / s", "tokens_per_second"),
)
ENDED = ("finished", "stopped", "failed", "not started")
Records = list[dict[str, Any]]


def curves(records: Records) -> str:
    """The charts of one run, as HTML."""
    found = []
    for title, name in DRAWN:
        points = [(line["step"], line[name]) for line in records if name in line]
        dots = [(line["step"], line["eval_loss"]) for line in records if "eval_loss" in line]
        if points:
            loss = name == "loss"
            found.append(charts.chart(title, [Curve(points, dots if loss else [], smoothed=loss)]))
    return f'<div class="charts">{"".join(found)}</div>' if found else ""


def share(run: RunDir, config: Config, records: Records) -> tuple[int, int] | None:
    """(steps done, steps in all)."""
    total = overview.total_steps(run, config)
    steps = [line["step"] for line in records[-50:] if "loss" in line]
    return (steps[-1] if steps else 0, total) if total else None


def told(run: RunDir, config: Config, records: Records) -> dict[str, str]:
    """The facts of a run, in the words of the vocabulary."""
    steps = [line for line in records[-200:] if "loss" in line]
    evaluated = [line["eval_loss"] for line in records if "eval_loss" in line]
    newest = steps[-1] if steps else {}
    shown = {
        "model": config.model.name,
        "method": config.method.name,
        "strategy": config.strategy.name,
        "precision": config.precision.name,
        "attempt": str(run.attempt),
        "loss": f"{newest['loss']:.4f}" if "loss" in newest else "",
        "eval_loss": f"{evaluated[-1]:.4f}" if evaluated else "",
        "learning rate": f"{newest['learning_rate']:.2e}" if newest else "",
        "tokens / s": f"{newest['tokens_per_second']:,.0f}"
        if "tokens_per_second" in newest
        else "",
        "time left": overview.time_left(steps, overview.total_steps(run, config)),
        "job": (slurm.job_of(run) or "") if isinstance(config.cluster, SlurmConfig) else "",
    }
    return {key: value for key, value in shown.items() if value}


def facts(
    name: str, state: str, known: dict[str, str], done_of: tuple[int, int] | None, words: Words
) -> str:
    """State, bar and facts of a run as HTML. All of it is text of ours or escaped."""
    if state in ENDED:
        known = {key: value for key, value in known.items() if key != "time left"}
    bar = ""
    if done_of:
        done, total = done_of
        width = f"width:{min(100.0, 100 * done / total):.1f}%"
        bar = (
            f'<div class="sw-bar" role="progressbar" aria-valuenow="{done}" '
            f'aria-valuemax="{total}"><div style="{width}"></div></div>'
            f'<div class="sw-steps">{html.escape(words("step"))} {done:,} / {total:,}</div>'
        )
    cells = "".join(
        f"<div><span>{html.escape(words(key))}</span><b>{html.escape(value)}</b></div>"
        for key, value in known.items()
    )
    badge = f'<em class="sw-state {html.escape(state.split()[0])}">{html.escape(words(state))}</em>'
    return (
        f'<div class="sw-run"><h3>{html.escape(name)} {badge}</h3>'
        f'{bar}<div class="sw-facts">{cells}</div></div>'
    )
