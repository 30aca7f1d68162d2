"""A model by path or hub id → its local folder. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from launcher.config.model_rules import is_hub_id
from launcher.errors import UserError


def the_safetensors_file(folder: Path) -> Path:
    """The weights of a folder without an index: `model.safetensors`, or its only file."""
    files = sorted(folder.glob("*.safetensors"))
    named = folder / "model.safetensors"
    if named in files or len(files) == 1:
        return named if named in files else files[0]
    raise UserError(
        f"{folder} holds {len(files)} safetensors files and no model.safetensors.index.json: "
        "which of them are the model cannot be told"
    )


MODEL = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def model_folder(
    name_or_path: str, revision: str | None, code: bool = False, only: tuple[str, ...] = MODEL
) -> Path:
    """The local folder of the model; a hub id is downloaded once (file locks make it safe).

    `code`: fetch the model's own Python files too; `only`: these of the others. Raises UserError
    when it cannot be fetched.
    """
    if not is_hub_id(name_or_path):
        return Path(name_or_path)
    from huggingface_hub import snapshot_download  # not needed for a folder

    patterns = [*only, *["*.py"] * code]
    try:
        return Path(snapshot_download(name_or_path, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises a dozen kinds; each means: not here
        raise UserError(
            f"model.name_or_path={name_or_path} could not be fetched from the hub: {error}. "
            "Give a local folder instead"
        ) from error
