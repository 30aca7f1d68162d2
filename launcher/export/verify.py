"""Checks that an exported folder is still what was written."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.export.completeness import check_complete
from launcher.export.opened import open_small_files
from launcher.export.writing import readback
from launcher.folders import manifest
from launcher.folders.brief import brief
from launcher.folders.file_names import matches
from launcher.folders.json_file import is_object, is_text, read_object
from launcher.folders.model import CONFIG, INDEX
from launcher.folders.model_config import read_model_config
from launcher.folders.model_files import EXPORT_MANIFEST as MANIFEST
from launcher.folders.tensor_entries import read_weight_map
from launcher.io.cpus import usable_cpus
from launcher.io.readers.safetensors_file import read_header
from launcher.io.tensor import Tensor

AGAIN = "the same export once more, or a whole copy of the folder"
LOADED = ("adapter_config.json", "adapter_model.*", "*.bin")  # beside a model's safetensors


def verify(folder: Path) -> str:
    """One line that describes the folder. Raises UserError with the names of damaged files and
    tensors."""
    if not (folder / MANIFEST).is_file():
        reason = f"contains no {MANIFEST}, which lists what was written"
        way_out = f"shardway consolidate {folder} --output DIR writes a copy with one"
        if not folder.is_dir():
            reason, way_out = "is not a folder", "the folder that shardway consolidate wrote"
        raise UserError(f"{folder} {reason} → {way_out}")
    written = manifest.read(folder / MANIFEST)
    if not isinstance(written.get("tensors"), dict):
        raise UserError(
            f"{folder / MANIFEST} lists no tensors: it is damaged, or of another version → {AGAIN}"
        )
    shards = {n for n in written["files"] if n.endswith(".safetensors") and "/" not in n}
    _compare_contents(folder, written, shards)
    _refuse_added(folder, written["files"].keys())
    summary = check_structure(folder, shards)
    opened = open_small_files(folder)
    if not (folder / CONFIG).is_file():  # an adapter
        return "; ".join([summary, *opened])
    headers = [read_header(folder / name) for name in shards]
    tensors = {name: tensor for header in headers for name, tensor in header.items()}
    notes = check_complete(folder, read_model_config(folder / CONFIG), tensors)
    return "; ".join([summary, *opened, *notes])


def check_structure(folder: Path, shards: set[str]) -> str:
    """Compare the shards with the index, without reading values. Returns one line that describes
    the folder.

    `shards`: the names of the shards that the folder should contain. Raises UserError if they, or
    their tensors, differ.
    """
    files = sorted(folder.glob("*.safetensors"))
    if unknown := [file.name for file in files if file.name not in shards]:
        raise UserError(
            f"{folder} contains {', '.join(unknown)}, not written with it → move it elsewhere"
        )
    headers = {file.name: read_header(file) for file in files}
    if not headers:
        raise UserError(f"{folder} contains no shard → {AGAIN}")
    total = sum(tensor.nbytes for shard in headers.values() for tensor in shard.values())
    if (folder / INDEX).is_file():
        _check_index(folder / INDEX, headers, total)
    elif len(headers) != 1:
        raise UserError(f"{folder} contains {len(headers)} shards and no {INDEX} → {AGAIN}")
    largest = max(sum(tensor.nbytes for tensor in shard.values()) for shard in headers.values())
    return (
        f"{folder}: whole. {sum(map(len, headers.values()))} tensors, {total / 1e6:,.1f} MB in "
        f"{len(headers)} file(s), the largest {largest / 1e6:,.1f} MB"
    )


def _refuse_added(folder: Path, written: Collection[str]) -> None:
    """Raises UserError for files that libraries would load and that are not part of the export."""
    added = sorted(
        path.name
        for path in folder.iterdir()
        if matches(path.name, LOADED) and path.name not in written
    )
    if added:
        raise UserError(
            f"{folder} contains {', '.join(added)}, not written with it, and libraries would load "
            "it → move it elsewhere"
        )


def _compare_contents(folder: Path, written: dict[str, Any], shards: set[str]) -> None:
    other_files = {name: entry for name, entry in written["files"].items() if name not in shards}
    messages = [manifest.problem(folder / name, entry) for name, entry in other_files.items()]
    problems = [message for message in messages if message]
    for name, entry in written["tensors"].items():
        if not (is_object(entry) and is_text(entry.get("xxh3_64"))):
            raise UserError(f"{folder / MANIFEST} is damaged: it lists {name} as {brief(entry)}")
    tensors = {name: entry["xxh3_64"] for name, entry in written["tensors"].items()}
    files = {name: written["files"][name] | {"tensors": tensors} for name in sorted(shards)}
    try:
        readback.compare_checksums(folder, files, min(usable_cpus(), 4))
    except UserError as error:
        problems.append(str(error))
    if problems:
        raise UserError(f"{'; '.join(problems)} → {AGAIN}")


def _check_index(path: Path, shards: dict[str, dict[str, Tensor]], total: int) -> None:
    weight_map, metadata = read_weight_map(path), read_object(path).get("metadata")
    actual = {name: file for file, shard in shards.items() for name in shard}
    if differing := sorted(weight_map.items() ^ actual.items()):
        raise UserError(
            f"{path} and the shards disagree on {differing[0][0]} ({len(differing)} entries) → "
            f"{AGAIN}"
        )
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    if stated != total:
        raise UserError(
            f"{path} states a total_size of {stated}, the shards contain {total} → {AGAIN}"
        )
