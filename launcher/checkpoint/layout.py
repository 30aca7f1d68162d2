"""Names inside a checkpoint folder and its manifest. Imports no torch.

checkpoints/step-000045/
    adapter/        adapter_config.json, adapter_model.safetensors   (methods with an adapter)
    model/          .metadata, __0_0.distcp …                        (torch DCP, other methods)
    manifest.json   written last: a folder without it is no checkpoint
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launcher.errors import UserError

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
