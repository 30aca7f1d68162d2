"""The names inside a checkpoint folder. Imports no torch.

checkpoints/step-000045/
    adapter/             adapter_config.json, adapter_model.safetensors  (methods with an adapter)
    optimizer.safetensors     its optimizer state, unsharded
    model/ optimizer/    .metadata, __0_0.distcp …                       (torch DCP, other methods)
    rng/rank-00.safetensors   random states, one file per rank
    tokenizer.json …     the base's tokenizer with data.template         (only with data.template)
    trainer.json         step, tokens, position in the schedule and the data
    config.yaml          the frozen configuration
    manifest.json        written last: a folder without it is not a checkpoint
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.folders import manifest

MANIFEST = "manifest.json"
ADAPTER = "adapter"
MODEL = "model"
# The manifest key for how QLoRA quantized the base weights, spelled as in the first checkpoints.
SCHEME = "quantisation"
# The manifest key for the ids of the tokens that end an answer; null: the rows have no answers.
# Checkpoints of versions that did not save the key have a tokenizer in transformers' own form.
END_TOKENS = "end_tokens"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder. All code takes the names inside it from here."""

    path: Path

    @property
    def step(self) -> int:
        """The optimizer step after which it was saved."""
        return int(self.path.name.removeprefix("step-"))

    @property
    def adapter(self) -> Path | None:
        """The PEFT folder, None if the method has no adapter."""
        folder = self.path / ADAPTER
        return folder if folder.is_dir() else None

    @property
    def model(self) -> Path | None:
        """The DCP folder of the trained weights, None if the method has an adapter."""
        folder = self.path / MODEL
        return folder if folder.is_dir() else None

    @property
    def moments(self) -> Path:
        """The optimizer state of an adapter."""
        return self.path / "optimizer.safetensors"

    @property
    def optimizer(self) -> Path:
        """The DCP folder of the optimizer state, for methods without an adapter."""
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
        """The random states of `rank`."""
        return self.path / "rng" / f"rank-{rank:02d}.safetensors"

    @property
    def is_finished(self) -> bool:
        """Whether it has a manifest, which is written last. Files may have been damaged since."""
        try:
            self.summary()
        except UserError:
            return False
        return True

    def summary(self) -> dict[str, Any]:
        """The manifest. The files are not checked against it."""
        return manifest.read(self.manifest)


def checkpoint_name(step: int) -> str:
    """The folder name of the checkpoint after `step`."""
    return f"step-{step:06d}"


def all_checkpoints(checkpoints: Path) -> list[Checkpoint]:
    """All folders with the name of a checkpoint, newest first, complete or not."""
    return sorted(
        map(Checkpoint, checkpoints.glob("step-*")), key=lambda checkpoint: -checkpoint.step
    )


def finished_checkpoints(checkpoints: Path) -> list[Checkpoint]:
    """The checkpoints that have a manifest, newest first."""
    return [each for each in all_checkpoints(checkpoints) if each.is_finished]


def newest_checkpoint(checkpoints: Path) -> Checkpoint:
    """The finished checkpoint with the highest step. Raises UserError if there is none."""
    finished = finished_checkpoints(checkpoints)
    if not finished:
        raise UserError(f"{checkpoints} contains no finished checkpoint (step-…/{MANIFEST})")
    return finished[0]
