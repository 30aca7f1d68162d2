"""`shardway report`: the curves and settings of several runs side by side in one HTML page."""

from __future__ import annotations

from pathlib import Path

from launcher.commands.arguments import command_parser
from launcher.errors import UserError
from launcher.folders import manifest
from launcher.tracking import report

ABOUT = """\
Write one HTML page with the curves of runs over their steps, a table of the runs, and the settings
in which they differ. The page loads no other files and can be sent by mail.

    shardway report runs/first                          writes runs/first/report.html
    shardway report runs/a runs/b --output report.html  several curves in each chart
    shardway report runs/sweep --output sweep.html      all runs of a sweep
"""


def main() -> None:
    parser = command_parser("report", ABOUT)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run or a sweep")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the page; default for one run: RUN/report.html"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace FILE even if it is not a report"
    )
    arguments = parser.parse_args()
    runs = report.read_runs(arguments.runs)
    output = report.output_path(arguments.output, runs, arguments.overwrite)
    try:
        manifest.write_text(output, report.render_page(runs))
    except OSError as error:
        raise UserError(f"the report cannot be written: {error}") from error
    print(f"report: {output}")
