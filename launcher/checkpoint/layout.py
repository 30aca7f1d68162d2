"""Names inside a checkpoint folder and its manifest. Imports no torch.

    checkpoints/step-000045/
        adapter/        adapter_config.json, adapter_model.safetensors   (methods with an adapter)
        model/          .metadata, __0_0.distcp …                        (torch DCP, other methods)
        manifest.json   written last: a folder without it is no checkpoint
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from launcher.errors import UserError
from launcher.run_dir import write_json

MANIFEST = "manifest.json"
ADAPTER = "adapter"
MODEL = "model"


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int

    @property
    def adapter(self) -> Path | None:
        folder = self.path / ADAPTER
        return folder if folder.is_dir() else None

    @property
    def model(self) -> Path | None:
        folder = self.path / MODEL
        return folder if folder.is_dir() else None


def folder_name(step: int) -> str:
    return f"step-{step:06d}"


def newest(checkpoints: Path) -> Checkpoint:
    """The finished checkpoint with the highest step. Raises UserError when there is none."""
    found = [
        Checkpoint(path, int(path.name.removeprefix("step-")))
        for path in checkpoints.glob("step-*")
        if (path / MANIFEST).is_file()
    ]
    if not found:
        raise UserError(f"{checkpoints} holds no finished checkpoint (step-…/{MANIFEST})")
    return max(found, key=lambda checkpoint: checkpoint.step)


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """`content` with size and checksum (xxh3-128) of every file of `folder`."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "xxh3_128": checksum(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_json(folder / MANIFEST, {**content, "files": files})


def check_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder` after comparing every file with it.

    Raises UserError naming the files that are missing or changed.
    """
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    wrong = []
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            wrong.append(f"{path} is missing")
        elif path.stat().st_size != expected["bytes"]:
            wrong.append(f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}")
        elif checksum(path) != expected["xxh3_128"]:
            wrong.append(f"{path} has another content than when it was saved")
    if wrong:
        raise UserError("; ".join(wrong))
    return manifest


def checksum(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
