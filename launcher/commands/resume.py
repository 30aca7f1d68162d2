"""`shardway resume RUN`: resume a run from its newest checkpoint, on the cluster where it ran."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from launcher.cluster.control import resume_run
from launcher.commands.arguments import command_parser
from launcher.errors import UserError
from launcher.folders.run import RunDir
from launcher.run.outcome import command_again


def main() -> None:
    """Exits with the status of the run."""
    parser = command_parser("resume", "Resume a run from its newest checkpoint, here or in Slurm.")
    parser.add_argument("run", type=Path, metavar="RUN")
    arguments, rest = parser.parse_known_args()
    if any("=" in word for word in rest):
        raise UserError(
            f"shardway resume continues a run with the settings that it has, not {shlex.join(rest)}"
            f" → {command_again(RunDir(arguments.run.absolute()))} {shlex.join(rest)}"
        )
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    sys.exit(resume_run(arguments.run))
