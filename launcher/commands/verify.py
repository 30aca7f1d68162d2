"""`shardway verify DIR`: check whether an exported folder is still what was written.

    shardway verify runs/first/export

Reads every file back and compares it with the manifest (size, xxh3-128; for a damaged shard, the
changed tensors are named). Opens every shard (its tensors must cover the file exactly) and compares
the shards with the index, and their names and shapes with the model's class. Loads config.json,
the tokenizer and generation_config.json with transformers.
"""

from __future__ import annotations

from pathlib import Path

from launcher.commands.arguments import command_parser
from launcher.export.verify import verify


def main() -> None:
    parser = command_parser("verify", __doc__)
    parser.add_argument("folder", type=Path, help="a folder that `shardway consolidate` wrote")
    print(verify(parser.parse_args().folder))
