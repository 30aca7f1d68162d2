"""`shardway stop RUN`: stop a run with a checkpoint at its next step boundary."""

from __future__ import annotations

from pathlib import Path

from launcher.cluster.control import request_stop
from launcher.commands.arguments import command_parser

ABOUT = """\
Stop a run, or all runs of a sweep, with a checkpoint. Waiting jobs are removed from the queue.
"""


def main() -> None:
    parser = command_parser("stop", ABOUT)
    parser.add_argument("run", type=Path, metavar="RUN")
    for message in request_stop(parser.parse_args().run.absolute()):
        print(message, flush=True)
