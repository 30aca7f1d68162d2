"""A run as HTML: its state, progress bar, facts and charts. Imports no torch."""

from __future__ import annotations

import html
from typing import Any

from launcher.config import Config
from launcher.config.schema.cluster import SlurmConfig
from launcher.folders.run import RunDir
from launcher.run.status import NO_ATTEMPT, slurm_job_id, time_left, total_steps
from launcher.tracking import svg
from launcher.tracking.svg import Curve
from launcher.ui.i18n import Translations

CHARTS = (  # title, field of metrics.jsonl
    ("loss per target token", "loss"),
    ("learning rate", "learning_rate"),
    ("tokens / s", "tokens_per_second"),
)
ENDED = ("finished", "stopped", "failed", "not started", NO_ATTEMPT)
Records = list[dict[str, Any]]  # lines of metrics.jsonl


def charts(records: Records) -> str:
    """The charts of one run; empty without records."""
    found = []
    evaluations = [
        (record["step"], record["eval_loss"]) for record in records if "eval_loss" in record
    ]
    for title, name in CHARTS:
        points = [(line["step"], line[name]) for line in records if name in line]
        if points:
            is_loss = name == "loss"
            curve = Curve(points, evaluations if is_loss else [], smoothed=is_loss)
            found.append(svg.chart(title, [curve]))
    return f'<div class="charts">{"".join(found)}</div>' if found else ""


def progress(run: RunDir, config: Config, records: Records) -> tuple[int, int] | None:
    """(steps done, total steps); None while the total is unknown."""
    total = total_steps(run, config)
    steps = [record["step"] for record in records[-50:] if "loss" in record]
    return (steps[-1] if steps else 0, total) if total else None


def facts(run: RunDir, config: Config, records: Records) -> dict[str, str]:
    """The facts about a run by their English label. Leaves out unknown ones."""
    steps = [record for record in records[-200:] if "loss" in record]
    evaluated = [record["eval_loss"] for record in records if "eval_loss" in record]
    newest = steps[-1] if steps else {}
    values = {
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
        "time left": time_left(steps, total_steps(run, config)),
        "job": (slurm_job_id(run) or "") if isinstance(config.cluster, SlurmConfig) else "",
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
