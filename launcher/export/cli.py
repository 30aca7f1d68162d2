"""`shardway consolidate`: any result of training in, a verified folder out that servers load.

    shardway consolidate runs/first --output runs/first/export --max-shard-size 5GB
    shardway consolidate runs/first/checkpoints/step-000045 --output export
    shardway consolidate path/to/adapter --base path/to/model --output export
    shardway consolidate path/to/model --adapter path/to/adapter --output export

SOURCE is a run (its newest checkpoint is taken), a checkpoint, a PEFT adapter folder or a model
folder, recognised by what is in it. Nothing existing is overwritten.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from launcher.errors import UserError
from launcher.export.plan import make_plan, parse_size
from launcher.export.source import find_source
from launcher.export.verify import verify
from launcher.export.write import refuse_target, write


def main() -> None:
    """Exit status 0 when the folder stands and is verified, 2 when the request cannot be met."""
    arguments = _parser().parse_args()
    try:
        consolidate(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def consolidate(arguments: argparse.Namespace) -> None:
    source = find_source(arguments.source, arguments.base, arguments.adapter)
    plan = make_plan(source, parse_size(arguments.max_shard_size))
    refuse_target(plan, arguments.output)
    print(f"base {source.base}")
    print(f"trained {source.adapter or source.shards or None}")
    print(plan.describe(), flush=True)
    if arguments.dry_run:
        return
    began = time.perf_counter()
    write(plan, arguments.output)
    rate = plan.nbytes / 1e6 / (time.perf_counter() - began)
    print(f"written at {rate:,.0f} MB/s")
    print(verify(arguments.output))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shardway consolidate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the new folder")
    parser.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="largest file in tensor bytes: 5GB is 5·10⁹, GiB is accepted (default %(default)s)",
    )
    parser.add_argument(
        "--base", metavar="DIR", help="the model training began with, where SOURCE names another"
    )
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="merge it into a model folder")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, write nothing")
    return parser


if __name__ == "__main__":
    main()
