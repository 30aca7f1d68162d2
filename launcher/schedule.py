"""`shardway schedule`: draw the learning rate of a configuration before anything is trained."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from launcher import curve, train
from launcher.config import Config, checks, store
from launcher.config.rule import World
from launcher.config.schedule_rules import SCHEDULE_RULES
from launcher.config.scheduler import PlateauConfig, SchedulerConfig
from launcher.errors import UserError
from launcher.paths import picture_at

ABOUT = """\
Draw the learning rate of a configuration over its steps, in the terminal and as a picture, before
anything is trained. Takes the overrides of `shardway train`; neither model nor data need be there.

    shardway schedule scheduler=cosine scheduler.warmup_ratio=0.1 training.max_steps=500
    shardway schedule --steps 500 --output curve.png scheduler=polynomial scheduler.power=2
    shardway schedule --steps 500 --multirun scheduler=linear,cosine,polynomial,inverse_sqrt

The last one draws several curves into one picture. Each value is the rate of that step, as
metrics.jsonl will have it. What the curves are for: docs/schedulers.md
"""
WIDTH, HEIGHT = 64, 12

Curves = dict[str, list[float]]  # label → the learning rate of each step


def main() -> None:
    """The command line. Exits with 2 when there is nothing to draw."""
    options, overrides = _parser().parse_known_args()
    sys.argv = [sys.argv[0], *["--multirun"] * options.multirun, *overrides]
    try:
        curves: Curves = {}
        for config in train.compose():
            config = _with_steps(config, options.steps)
            curves[_label(config.scheduler, curves)] = rates(config)
        picture = (
            None
            if options.no_picture
            else picture_at(options.output, "schedule.png", options.overwrite)
        )
        print("\n\n".join(chart(label, values) for label, values in curves.items()), flush=True)
        if picture:
            draw(curves, picture)
            print(f"\npicture: {picture}")
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(train.UNUSABLE_CONFIGURATION)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shardway schedule",
        usage="%(prog)s [options] [OVERRIDE ...]",
        description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--steps", type=int, metavar="N", help="instead of training.max_steps")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the picture (.png, .svg, .pdf); schedule.png"
    )
    parser.add_argument("--overwrite", action="store_true", help="even where FILE exists")
    parser.add_argument(
        "--multirun", "-m", action="store_true", help="a curve for each of scheduler=linear,cosine"
    )
    parser.add_argument("--no-picture", action="store_true", help="draw in the terminal alone")
    return parser


def _with_steps(config: Config, steps: int | None) -> Config:
    """`config` with a known number of steps. Raises UserError for what breaks a rule of them."""
    steps = config.training.max_steps if steps is None else steps
    if steps is None or steps < 1:
        raise UserError(
            "how many steps training.epochs will be is not known without the data "
            "→ --steps 500, or training.max_steps=500"
            if steps is None
            else f"--steps {steps} is no number of steps → --steps 500"
        )
    training = dataclasses.replace(config.training, max_steps=steps, epochs=None)
    config = dataclasses.replace(config, training=training)
    if problems := checks.broken_rules(config, World(1, 1, 0), SCHEDULE_RULES):
        raise store.ConfigError(problems)
    return config


def rates(config: Config) -> list[float]:
    """The learning rate of each step; that of a plateau as if the loss never fell after the first
    evaluation."""
    peak, steps = config.optimizer.learning_rate, config.training.max_steps or 0
    if not isinstance(config.scheduler, PlateauConfig):
        return curve.rates(config.scheduler, peak, steps)
    import torch  # two seconds: its own arithmetic is drawn

    from launcher.scheduler import Plateau

    every = config.training.eval_steps or steps
    schedule = Plateau(config.scheduler, torch.optim.SGD([torch.zeros(1)], lr=peak))
    found = []
    for step in range(1, steps + 1):
        found.append(float(schedule.get_last_lr()[0]))
        if step % every == 0:
            schedule.evaluated(1.0)
    return found


def _label(scheduler: SchedulerConfig, taken: Curves) -> str:
    """Name and what is set otherwise than by default; numbered when it stands already."""
    changed = [
        f"{field.name}={getattr(scheduler, field.name):g}"
        for field in dataclasses.fields(scheduler)
        if field.name != "name" and getattr(scheduler, field.name) != field.default
    ]
    label = " ".join([scheduler.name, *changed])
    return label if label not in taken else f"{label} ({len(taken) + 1})"


def chart(label: str, values: list[float]) -> str:
    """`values` (≥ 1 of them) in plain characters, with a line of words below."""
    peak, last = max(values), len(values) - 1
    columns = min(WIDTH, len(values))
    shown = [values[round(at * last / max(1, columns - 1))] for at in range(columns)]
    rows = [round(value / peak * (HEIGHT - 1)) if peak else 0 for value in shown]
    lines = [label]
    for row in reversed(range(HEIGHT)):
        axis = f"{peak * row / (HEIGHT - 1):9.2e}" if row in (0, HEIGHT - 1) else " " * 9
        lines.append(f"{axis} |" + "".join("*" if at == row else " " for at in rows).rstrip())
    lines.append(f"{'':9} +{'-' * columns}")
    end = f"{len(values):>{columns - 1}}" if columns > 1 else ""
    lines.append(f"{'step':>9}  1{end}")
    lines.append(
        f"rate {values[0]:.3g} in step 1, {peak:.3g} at most (step {values.index(peak) + 1}), "
        f"{values[-1]:.3g} in step {len(values)}"
    )
    if label.startswith("reduce_lr_on_plateau"):
        lines.append("drawn as if the evaluation loss never fell after the first evaluation")
    return "\n".join(lines)


def draw(curves: Curves, picture: Path) -> None:
    """Draw all curves into one picture. Raises UserError where it cannot be written."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for label, values in curves.items():
        axes.plot(range(1, len(values) + 1), values, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(picture, dpi=120)
    except (OSError, ValueError) as error:  # ValueError: an ending that names no format
        raise UserError(f"--output {picture} cannot be written: {error}") from error


if __name__ == "__main__":
    main()
