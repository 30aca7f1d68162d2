"""`shardway verify DIR`: is an exported folder still what was written?

    shardway verify runs/first/export

Compares every file with the manifest (size, xxh3-128), opens every shard (its tensors must tile the
file exactly), and compares the shards with the index.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from launcher import manifest
from launcher.errors import UserError
from launcher.export.safetensors_file import StoredTensor, read_header
from launcher.export.write import INDEX, MANIFEST


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="shardway verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="a folder that `shardway consolidate` wrote")
    try:
        print(verify(parser.parse_args().folder))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def verify(folder: Path) -> str:
    """One line of what was found whole. Raises UserError naming what is not."""
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} holds no {MANIFEST}; was it written by shardway consolidate?")
    written = manifest.check(folder / MANIFEST)
    files = sorted(folder.glob("*.safetensors"))
    if strangers := [file.name for file in files if file.name not in written["files"]]:
        raise UserError(f"{folder} holds {strangers}, which were not written with it")
    shards = {file.name: read_header(file) for file in files}
    tensors = [tensor for shard in shards.values() for tensor in shard.values()]
    if (total := sum(tensor.nbytes for tensor in tensors)) != written["total_size"]:
        raise UserError(f"{folder} holds {total} bytes of tensors, not {written['total_size']}")
    if (folder / INDEX).is_file():
        _check_index(folder / INDEX, shards, total)
    elif len(shards) != 1:
        raise UserError(f"{folder} holds {len(shards)} shards and no {INDEX}")
    largest = max(sum(tensor.nbytes for tensor in shard.values()) for shard in shards.values())
    return (
        f"{folder}: whole. {len(tensors)} tensors, {total / 1e6:,.1f} MB in {len(shards)} file(s), "
        f"the largest {largest / 1e6:,.1f} MB"
    )


def _check_index(path: Path, shards: dict[str, dict[str, StoredTensor]], total: int) -> None:
    index = json.loads(path.read_text())
    found = {name: file for file, shard in shards.items() for name in shard}
    if apart := sorted(index["weight_map"].items() ^ found.items()):
        raise UserError(f"{path} and the shards disagree on {apart[0][0]} ({len(apart)} entries)")
    if (stated := index["metadata"]["total_size"]) != total:
        raise UserError(f"{path} states a total_size of {stated}, the shards hold {total}")


if __name__ == "__main__":
    main()
