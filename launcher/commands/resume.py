"""`shardway resume RUN`: resume a run from its newest checkpoint, on the cluster where it ran."""

from __future__ import annotations

import sys
from pathlib import Path

from launcher.cluster.control import resume_run
from launcher.commands.arguments import command_parser


def main() -> None:
    """Exits with the status of the run."""
    parser = command_parser("resume", "Resume a run from its newest checkpoint, here or in Slurm.")
    parser.add_argument("run", type=Path, metavar="RUN")
    sys.exit(resume_run(parser.parse_args().run))
