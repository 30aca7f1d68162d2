"""`shardway runs [FOLDER]`: a table of runs and their states, from their folders and `squeue`."""

from __future__ import annotations

from pathlib import Path

from launcher.cluster import runs_table
from launcher.commands.arguments import command_parser
from launcher.errors import UserError
from launcher.run.status import find_runs


def main() -> None:
    parser = command_parser("runs", "Print a table of the runs in FOLDER, or of a sweep.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), metavar="FOLDER")
    folder = parser.parse_args().folder
    if not find_runs(folder):
        raise UserError(f"{folder} contains no run (a folder with a config.yaml)")
    print(runs_table.format_table(folder), end="")
