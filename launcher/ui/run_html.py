"""A run as HTML: its state, progress bar, facts and charts. Imports no torch."""

from __future__ import annotations

import html

from launcher.config import Config
from launcher.config.schema.cluster import SlurmConfig
from launcher.folders.run import RunDir
from launcher.run.curves import RunMetrics
from launcher.run.metrics import format_number
from launcher.run.status import DAMAGED, NO_ATTEMPT, time_left
from launcher.tracking import svg
from launcher.tracking.svg import Curve
from launcher.ui.i18n import Translations

CHARTS = (  # title, field of metrics.jsonl
    ("loss per target token", "loss"),
    ("learning rate", "learning_rate"),
    ("tokens / s", "tokens_per_second"),
)
ENDED = ("finished", "stopped", "failed", "hung", "not started", NO_ATTEMPT, DAMAGED)


def charts(metrics: RunMetrics) -> str:
    """The charts of one run; empty without records."""
    found = []
    for title, name in CHARTS:
        is_loss = name == "loss"
        curve = Curve(
            metrics.points(name),
            metrics.evaluations() if is_loss else [],
            metrics.smoothed(name) if is_loss else [],
        )
        if curve.points:
            found.append(svg.chart(title, [curve]))
    return f'<div class="charts">{"".join(found)}</div>' if found else ""


def progress(metrics: RunMetrics, total: int | None) -> tuple[int, int] | None:
    """(steps done, total steps); None while the total is unknown."""
    return (metrics.newest.get("step", 0), total) if total else None


def facts(
    run: RunDir, config: Config | None, metrics: RunMetrics, total: int | None, job: str | None
) -> dict[str, str]:
    """The facts about a run by their English label. Leaves out unknown ones."""
    newest, last_eval = metrics.newest, metrics.last_eval_loss
    values = {
        "model": config.model.name if config else "",
        "method": config.method.name if config else "",
        "strategy": config.strategy.name if config else "",
        "precision": config.precision.name if config else "",
        "attempt": str(run.attempt),
        "loss": format_number(newest, "loss", ".4f"),
        "eval_loss": "" if last_eval is None else f"{last_eval:.4f}",
        "learning rate": format_number(newest, "learning_rate", ".2e"),
        "tokens / s": format_number(newest, "tokens_per_second", ",.0f"),
        "time left": time_left(metrics.pace, total),
        "job": (job or "") if config and isinstance(config.cluster, SlurmConfig) else "",
    }
    return {key: value for key, value in values.items() if value}


def run_card(
    name: str,
    state: str,
    values: dict[str, str],
    done_and_total: tuple[int, int] | None,
    translate: Translations,
) -> str:
    """State, progress bar and facts of a run. All text in it is escaped."""
    if state in ENDED:
        values = {key: value for key, value in values.items() if key != "time left"}
    bar = ""
    if done_and_total:
        done, total = done_and_total
        width = f"width:{min(100.0, 100 * done / total):.1f}%"
        bar = (
            f'<div class="sw-bar" role="progressbar" aria-valuenow="{done}" '
            f'aria-valuemax="{total}"><div style="{width}"></div></div>'
            f'<div class="sw-steps">{html.escape(translate("step"))} {done:,} / {total:,}</div>'
        )
    cells = "".join(
        f"<div><span>{html.escape(translate(key))}</span><b>{html.escape(value)}</b></div>"
        for key, value in values.items()
    )
    badge = (
        f'<em class="sw-state {html.escape(state.split()[0])}">{html.escape(translate(state))}</em>'
    )
    return (
        f'<div class="sw-run"><h3>{html.escape(name)} {badge}</h3>'
        f'{bar}<div class="sw-facts">{cells}</div></div>'
    )
