"""`shardway verify DIR`: is an exported folder still what was written?

    shardway verify runs/first/export

Reads every file back and compares it with the manifest (size, xxh3-128; of a damaged shard the
tensors that changed are named), opens every shard (its tensors must tile the file exactly), and
compares the shards with the index.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from launcher import manifest
from launcher.errors import UserError
from launcher.export.readers.safetensors_file import read_header
from launcher.export.result import readback
from launcher.export.result.companions import INDEX, MANIFEST
from launcher.export.tensor import Tensor


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
    written = manifest.read(folder / MANIFEST)
    if not isinstance(written.get("tensors"), dict):
        raise UserError(
            f"{folder / MANIFEST} lists no tensors: it is damaged, or of another version"
        )
    shards = {name for name in written["files"] if name.endswith(".safetensors")}
    _compare_contents(folder, written, shards)
    return structure(folder, shards)


def structure(folder: Path, shards: set[str]) -> str:
    """Shards and index against each other, without a look at the values; a line of what stands."""
    files = sorted(folder.glob("*.safetensors"))
    if strangers := [file.name for file in files if file.name not in shards]:
        raise UserError(f"{folder} holds {strangers}, which were not written with it")
    headers = {file.name: read_header(file) for file in files}
    total = sum(tensor.nbytes for shard in headers.values() for tensor in shard.values())
    if (folder / INDEX).is_file():
        _check_index(folder / INDEX, headers, total)
    elif len(headers) != 1:
        raise UserError(f"{folder} holds {len(headers)} shards and no {INDEX}")
    largest = max(sum(tensor.nbytes for tensor in shard.values()) for shard in headers.values())
    return (
        f"{folder}: whole. {sum(map(len, headers.values()))} tensors, {total / 1e6:,.1f} MB in "
        f"{len(headers)} file(s), the largest {largest / 1e6:,.1f} MB"
    )


def _compare_contents(folder: Path, written: dict[str, Any], shards: set[str]) -> None:
    others = {name: entry for name, entry in written["files"].items() if name not in shards}
    wrong = list(filter(None, (manifest.problem(folder / n, entry) for n, entry in others.items())))
    tensors = {name: str(entry["xxh3_64"]) for name, entry in written["tensors"].items()}
    files = {name: written["files"][name] | {"tensors": tensors} for name in sorted(shards)}
    try:
        readback.compare(folder, files, min(os.cpu_count() or 1, 4))
    except UserError as error:
        wrong.append(str(error))
    if wrong:
        raise UserError("; ".join(wrong))


def _check_index(path: Path, shards: dict[str, dict[str, Tensor]], total: int) -> None:
    index = json.loads(path.read_text())
    found = {name: file for file, shard in shards.items() for name in shard}
    if apart := sorted(index["weight_map"].items() ^ found.items()):
        raise UserError(f"{path} and the shards disagree on {apart[0][0]} ({len(apart)} entries)")
    if (stated := index["metadata"]["total_size"]) != total:
        raise UserError(f"{path} states a total_size of {stated}, the shards hold {total}")


if __name__ == "__main__":
    main()
