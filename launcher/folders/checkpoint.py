"""The names inside a checkpoint folder. Imports no torch.

checkpoints/step-000045/
    adapter/             adapter_config.json, adapter_model.safetensors  (methods with an adapter)
    optimizer.safetensors     its optimizer state, unsharded
    model/               .metadata, __0_0.distcp …  weights and moments  (torch DCP, other methods)
    rng.safetensors      random states of all ranks
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
from launcher.folders import links, manifest
from launcher.folders.brief import brief
from launcher.folders.json_file import DamagedFile

MANIFEST = "manifest.json"
ADAPTER = "adapter"
MODEL = "model"
# The manifest key for how QLoRA quantized the base weights, spelled as in the first checkpoints.
SCHEME = "quantisation"
# The manifest key for the ids of the tokens that end an answer; null: the rows have no answers.
# Checkpoints of versions that did not save the key have a tokenizer in transformers' own form.
END_TOKENS = "end_tokens"
# The manifest key for the class of transformers that was trained. Checkpoints of versions that did
# not save it were trained with the class that AutoModelForCausalLM picks.
TRAINED_CLASS = "class"
NAME = links.CHECKPOINT  # no other name is looked at
CONTENTS = ("all", "weights")
REQUIRED = ("step", "content", "base")  # other keys of the manifest came with later versions


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
    def optimizer(self) -> Path | None:
        """The DCP folder of the optimizer state in checkpoints of earlier versions, for methods
        without an adapter; None: it is in the folder `model`."""
        folder = self.path / "optimizer"
        return folder if folder.is_dir() else None

    @property
    def trainer(self) -> Path:
        return self.path / "trainer.json"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        return self.path / MANIFEST

    @property
    def rng(self) -> Path:
        """The random states of all ranks."""
        return self.path / "rng.safetensors"

    def old_rng(self, rank: int) -> Path:
        """The random states of `rank` in checkpoints of earlier versions."""
        return self.path / "rng" / f"rank-{rank:02d}.safetensors"

    @property
    def is_finished(self) -> bool:
        """Whether it has a manifest, which is written last, and `find_damage` finds nothing."""
        return self.find_damage() is None

    def find_damage(self) -> str | None:
        """Why this cannot be used as a checkpoint, from its manifest and its configuration; None if
        it can. The files with tensors are not opened."""
        try:
            files = self.summary()["files"]
        except UserError as error:
            return str(error)
        if self.config.name not in files:
            return f"{self.manifest} does not list {self.config.name}"
        return manifest.problem(self.config, files[self.config.name])

    def summary(self) -> dict[str, Any]:
        """The manifest. The files are not checked against it. Raises UserError if it is not the
        manifest of a checkpoint, or if a file, or the folder of this name, is a link that leads
        out of where it is."""
        links.inside(self.path.parent, self.path.name)
        links.check_tree(self.path)
        content = manifest.read(self.manifest)
        if missing := [key for key in REQUIRED if content.get(key) is None]:
            raise DamagedFile(
                self.manifest, f"is not the manifest of a checkpoint: it has no {missing[0]}"
            )
        if not isinstance(content["base"], dict):
            raise DamagedFile(self.manifest, f"is damaged: base is {brief(content['base'])}")
        if content["content"] not in CONTENTS:
            raise DamagedFile(self.manifest, f"is damaged: content is {content['content']!r}")
        return content


def checkpoint_name(step: int) -> str:
    """The folder name of the checkpoint after `step`."""
    return f"step-{step:06d}"


def all_checkpoints(checkpoints: Path) -> list[Checkpoint]:
    """All folders with the name of a checkpoint, newest first, complete or not. Files and folders
    with other names are not looked at."""
    if not checkpoints.is_dir():
        return []
    folders = (path for path in checkpoints.iterdir() if NAME.fullmatch(path.name))
    found = [Checkpoint(path) for path in folders if path.is_dir()]
    return sorted(found, key=lambda checkpoint: (-checkpoint.step, checkpoint.path.name))


def finished_checkpoints(checkpoints: Path) -> list[Checkpoint]:
    """The checkpoints that have a manifest and are not visibly damaged, newest first."""
    return [each for each in all_checkpoints(checkpoints) if each.is_finished]


def newest_checkpoint(checkpoints: Path) -> Checkpoint:
    """The finished checkpoint with the highest step. Raises UserError if there is none."""
    every = all_checkpoints(checkpoints)
    newest = next((each for each in every if each.is_finished), None)
    if newest is None:
        damage = f": {every[0].find_damage()}" if every else ""
        raise UserError(
            f"{checkpoints} contains no finished checkpoint (step-…/{MANIFEST}){damage}"
        )
    return newest


def damage_and_way_out(checkpoint: Checkpoint, damage: str) -> str:
    """`damage` of a checkpoint, and which older one of the same run to name instead. Reads all
    files of that one."""
    if not NAME.fullmatch(checkpoint.path.name):
        return damage
    for other in finished_checkpoints(checkpoint.path.parent):
        if other.step < checkpoint.step and not manifest.problems(other.manifest):
            return f"{damage}; name {other.path}, which is whole"
    return f"{damage}; no older checkpoint is whole"


def describe_skipped(checkpoints: Path) -> list[str]:
    """A message for each checkpoint that is newer than the newest finished one and damaged. A
    folder without a manifest is one that is being written or was given up, and not mentioned."""
    messages = []
    for checkpoint in all_checkpoints(checkpoints):
        if (damage := checkpoint.find_damage()) is None:
            break
        if checkpoint.manifest.exists():
            messages.append(f"{checkpoint.path.name} is damaged and not used: {damage}")
    return messages
