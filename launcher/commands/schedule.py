"""`shardway schedule`: draw the learning rate of a configuration before training."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from launcher.commands.arguments import command_parser, picture_path
from launcher.config import Config, store
from launcher.config.compose import compose_command_line
from launcher.config.rules.rule import World
from launcher.config.rules.schedule import SCHEDULE_RULES
from launcher.config.rules.table import broken_rules
from launcher.config.schema.scheduler import PlateauConfig, SchedulerConfig
from launcher.errors import UserError
from launcher.training import lr_curve

ABOUT = """\
Draw the learning rate of a configuration over its steps, in the terminal and as a picture, before
training. Takes the overrides of `shardway train`. The model and the data do not have to exist.

    shardway schedule scheduler=cosine scheduler.warmup_ratio=0.1 training.max_steps=500
    shardway schedule --steps 500 --output curve.png scheduler=polynomial scheduler.power=2
    shardway schedule --steps 500 --multirun scheduler=linear,cosine,polynomial,inverse_sqrt

The last command draws several curves in one picture. Each value is the learning rate of that step,
as metrics.jsonl will have it. When to use which curve: docs/schedulers.md
"""
WIDTH, HEIGHT = 64, 12  # of a chart in the terminal, in characters

Curves = dict[str, list[float]]  # label → the learning rate of each step


def main() -> None:
    options, overrides = _parser().parse_known_args()
    sys.argv = [sys.argv[0], *["--multirun"] * options.multirun, *overrides]
    curves: Curves = {}
    for config in compose_command_line():
        config = _with_steps(config, options.steps)
        curves[_label(config.scheduler, curves)] = learning_rates(config)
    picture = None
    if not options.no_picture:
        picture = picture_path(options.output, "schedule.png", options.overwrite)
    print("\n\n".join(format_chart(label, rates) for label, rates in curves.items()), flush=True)
    if picture:
        draw_picture(curves, picture)
        print(f"\npicture: {picture}")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("schedule", ABOUT, "%(prog)s [options] [OVERRIDE ...]")
    parser.add_argument("--steps", type=int, metavar="N", help="instead of training.max_steps")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="the picture (.png, .svg, .pdf); default: schedule.png",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    parser.add_argument(
        "--multirun", "-m", action="store_true", help="a curve for each of scheduler=linear,cosine"
    )
    parser.add_argument("--no-picture", action="store_true", help="draw only in the terminal")
    return parser


def _with_steps(config: Config, steps: int | None) -> Config:
    """`config` with a known number of steps. Raises UserError if it is unknown, or if it breaks a
    rule of the schedule."""
    steps = config.training.max_steps if steps is None else steps
    if steps is None or steps < 1:
        raise UserError(
            "the number of steps of training.epochs is unknown without the data "
            "→ --steps 500, or training.max_steps=500"
            if steps is None
            else f"--steps {steps} is not a number of steps → --steps 500"
        )
    training = dataclasses.replace(config.training, max_steps=steps, epochs=None)
    config = dataclasses.replace(config, training=training)
    if problems := broken_rules(config, World(1, 1), SCHEDULE_RULES):
        raise store.ConfigError(problems)
    return config


def learning_rates(config: Config) -> list[float]:
    """The learning rate of each step. For reduce_lr_on_plateau, as if the evaluation loss never
    fell after the first evaluation."""
    peak, steps = config.optimizer.learning_rate, config.training.max_steps or 0
    if not isinstance(config.scheduler, PlateauConfig):
        return lr_curve.learning_rates(config.scheduler, peak, steps)
    import torch  # takes two seconds; its own scheduler computes these values

    from launcher.training.scheduler import PlateauSchedule

    eval_steps = config.training.eval_steps or steps
    schedule = PlateauSchedule(config.scheduler, torch.optim.SGD([torch.zeros(1)], lr=peak))
    rates = []
    for step in range(1, steps + 1):
        rates.append(float(schedule.get_last_lr()[0]))
        if step % eval_steps == 0:
            schedule.step_on_evaluation(1.0)
    return rates


def _label(scheduler: SchedulerConfig, curves: Curves) -> str:
    """The scheduler's name and its settings that differ from the defaults, with a number if that
    label exists."""
    changed = [
        f"{field.name}={getattr(scheduler, field.name):g}"
        for field in dataclasses.fields(scheduler)
        if field.name != "name" and getattr(scheduler, field.name) != field.default
    ]
    label = " ".join([scheduler.name, *changed])
    return label if label not in curves else f"{label} ({len(curves) + 1})"


def format_chart(label: str, rates: list[float]) -> str:
    """A chart of `rates` (at least one) in plain characters, with a line of text below."""
    peak, last = max(rates), len(rates) - 1
    columns = min(WIDTH, len(rates))
    shown = [rates[round(column * last / max(1, columns - 1))] for column in range(columns)]
    heights = [round(rate / peak * (HEIGHT - 1)) if peak else 0 for rate in shown]
    lines = [label]
    for row in reversed(range(HEIGHT)):
        axis = f"{peak * row / (HEIGHT - 1):9.2e}" if row in (0, HEIGHT - 1) else " " * 9
        marks = "".join("*" if height == row else " " for height in heights)
        lines.append(f"{axis} |" + marks.rstrip())
    lines.append(f"{'':9} +{'-' * columns}")
    end = f"{len(rates):>{columns - 1}}" if columns > 1 else ""
    lines.append(f"{'step':>9}  1{end}")
    lines.append(
        f"rate {rates[0]:.3g} in step 1, {peak:.3g} at most (step {rates.index(peak) + 1}), "
        f"{rates[-1]:.3g} in step {len(rates)}"
    )
    if label.startswith("reduce_lr_on_plateau"):
        lines.append("drawn as if the evaluation loss never fell after the first evaluation")
    return "\n".join(lines)


def draw_picture(curves: Curves, picture: Path) -> None:
    """Draw all curves in one picture. Raises UserError if it cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, rates in curves.items():
        axes.plot(range(1, len(rates) + 1), rates, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(picture, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: the suffix is not a known format
        raise UserError(f"--output {picture} cannot be written: {error}") from error
