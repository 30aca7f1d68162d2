"""Whether what a training of a model folder would leave can be exported, before it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.export import names
from launcher.export.assembled import SAME_NAMES
from launcher.folders.model import CONFIG
from launcher.folders.model_config import read_model_config
from launcher.folders.tensor_entries import tensor_names
from launcher.folders.vocabulary import TIE, config_value
from launcher.io.model_class import trained_class, trained_places
from launcher.io.readers import model_folder

LISTED = 3  # names in a message


def check_exportable(folder: Path, trust_remote_code: bool = False) -> None:
    """Do with the headers of the folder's files what an export does: name the tensors as in memory,
    and these as on disk again.

    No weight is read. Raises UserError if the result would not have the tensors of the folder, or
    if the class that is trained is not part of the one that config.json names.
    """
    config = read_model_config(folder / CONFIG)
    if trust_remote_code and config.get("auto_map"):
        return  # only its own code knows
    if _is_plain(folder, config):
        return
    try:
        _check(folder, config, trust_remote_code)
    except UserError as error:
        raise UserError(
            f"model.name_or_path={folder} could not be exported after training: {error}"
        ) from error


def _is_plain(folder: Path, config: dict[str, Any]) -> bool:
    """Whether the names on disk are those in memory. This takes no import of transformers."""
    classes = config.get("architectures") or ["ForCausalLM"]
    return (
        config.get("model_type") in SAME_NAMES
        and classes[0].endswith(("ForCausalLM", "LMHeadModel"))
        and any(name.startswith(("model.", "transformer.")) for name in tensor_names(folder))
    )


def _check(folder: Path, config: dict[str, Any], trust_remote_code: bool) -> None:
    import transformers

    try:
        values = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each class checks its values in its own way
        raise UserError(f"it cannot be read: {error!s:.300}") from error
    if not config.get("architectures"):
        raise UserError(
            f"{folder / CONFIG} names no class → "
            f'"architectures": ["{trained_class(values).__name__}"] in it'
        )
    trained_places(values)
    disk = model_folder.read_model(folder).tensors
    naming = names.find_naming(folder, trust_remote_code, tuple(disk))
    again = naming.to_disk(naming.to_memory(disk))
    tied = {"lm_head.weight", "embed_out.weight"} if config_value(config, TIE) else set()
    shapes = {name: tensor.shape for name, tensor in disk.items() if name not in tied}
    found = {name: tensor.shape for name, tensor in again.items() if name not in tied}
    if differing := sorted(name for name, _ in shapes.items() ^ found.items()):
        raise UserError(
            f"transformers would write {len(set(differing))} tensor(s) of other names or shapes, "
            f"such as {', '.join(dict.fromkeys(differing[:LISTED]))} → the folder in the form that "
            f"transformers writes: {type(naming.model).__name__}.from_pretrained(FOLDER)"
            ".save_pretrained(NEW), then model.name_or_path=NEW"
        )
