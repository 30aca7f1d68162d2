"""`shardway runs [FOLDER]`: a table of runs and their states, from their folders and `squeue`."""

from __future__ import annotations

from pathlib import Path

from launcher.cluster import runs_table
from launcher.commands.arguments import command_parser
from launcher.errors import UserError
from launcher.folders.run import RunDir
from launcher.run.status import find_runs

DEFAULT = Path("runs")


def main() -> None:
    parser = command_parser("runs", "Print a table of the runs in FOLDER, of a sweep or of a run.")
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=DEFAULT,
        metavar="FOLDER",
        help="a folder of runs, a sweep or a run (default: ./runs)",
    )
    folder = parser.parse_args().folder
    if not find_runs(folder) and not RunDir(folder).has_config:
        default = "; FOLDER is ./runs by default → shardway runs FOLDER"
        raise UserError(
            f"{folder} contains no run (a folder with a config.yaml)"
            f"{default if folder == DEFAULT else ''}"
        )
    print(runs_table.format_table(folder), end="")
