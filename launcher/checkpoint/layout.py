"""Names inside a checkpoint folder. Imports no torch.

checkpoints/step-000045/
    adapter/             adapter_config.json, adapter_model.safetensors  (methods with an adapter)
    optimizer.safetensors     its optimizer state, unsharded
    model/ optimizer/    .metadata, __0_0.distcp …                       (torch DCP, other methods)
    rng/rank-00.safetensors   random states, one file a rank
    trainer.json         step, tokens, place in schedule and data
    config.yaml          the frozen configuration
    manifest.json        written last: a folder without it is no checkpoint
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import manifest
from launcher.errors import UserError

MANIFEST = "manifest.json"
ADAPTER = "adapter"
MODEL = "model"


@dataclass(frozen=True)
class Checkpoint:
    path: Path

    @property
    def step(self) -> int:
        return int(self.path.name.removeprefix("step-"))

    @property
    def adapter(self) -> Path | None:
        folder = self.path / ADAPTER
        return folder if folder.is_dir() else None

    @property
    def model(self) -> Path | None:
        folder = self.path / MODEL
        return folder if folder.is_dir() else None

    @property
    def moments(self) -> Path:
        """Of the optimizer of an adapter."""
        return self.path / "optimizer.safetensors"

    @property
    def optimizer(self) -> Path:
        """Of the optimizer of a whole model."""
        return self.path / "optimizer"

    @property
    def trainer(self) -> Path:
        return self.path / "trainer.json"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        return self.path / MANIFEST

    def rng(self, rank: int) -> Path:
        return self.path / "rng" / f"rank-{rank:02d}.safetensors"

    @property
    def is_finished(self) -> bool:
        """Whether it has a manifest, which is written last. Its files may be damaged since."""
        try:
            self.summary()
        except UserError:
            return False
        return True

    def summary(self) -> dict[str, Any]:
        """What the manifest says, without a look at the files."""
        return manifest.read(self.manifest)


def folder_name(step: int) -> str:
    return f"step-{step:06d}"


def named(checkpoints: Path) -> list[Checkpoint]:
    """All folders with the name of a checkpoint, newest first, whole or not."""
    return sorted(map(Checkpoint, checkpoints.glob("step-*")), key=lambda each: -each.step)


def finished(checkpoints: Path) -> list[Checkpoint]:
    """The checkpoints that have a manifest, newest first."""
    return [each for each in named(checkpoints) if each.is_finished]


def newest(checkpoints: Path) -> Checkpoint:
    """The finished checkpoint with the highest step. Raises UserError when there is none."""
    found = finished(checkpoints)
    if not found:
        raise UserError(f"{checkpoints} holds no finished checkpoint (step-…/{MANIFEST})")
    return found[0]
