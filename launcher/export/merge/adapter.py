"""An adapter's folder, and the adapters that a live PEFT model's state holds."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.export.readers.safetensors_file import read_header
from launcher.export.readers.torch_file import read_file
from launcher.export.tensor import Tensor

PREFIX = "base_model.model."
NAMELESS = (  # as PEFT's files have them, without the adapter's name
    r".+\.(lora_[AB]\.(weight|bias)|lora_embedding_[AB]|lora_magnitude_vector|"
    r"token_adapter\.trainable_tokens_delta)"
)


@dataclass(frozen=True)
class Adapter:
    origin: Path  # for messages
    config: dict[str, Any]  # adapter_config.json
    tensors: dict[str, Tensor]  # by the names of PEFT's files, without the adapter's name


def read_adapter(folder: Path) -> Adapter:
    """adapter_config.json and adapter_model.safetensors (or .bin) of `folder`.

    Raises UserError when one is missing or damaged.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise UserError(f"{file} is missing; name a folder that PEFT's save_pretrained wrote")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is no JSON file: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} holds a {type(config).__name__}, expected an object")
    return Adapter(folder, config, _tensors(folder))


def _tensors(folder: Path) -> dict[str, Tensor]:
    safe, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if safe.is_file():
        return read_header(safe)
    if not pickled.is_file():
        raise UserError(f"{safe} is missing; {folder} holds no adapter weights")
    found = read_file(pickled)
    if not isinstance(found, dict) or not all(isinstance(each, Tensor) for each in found.values()):
        raise UserError(f"{pickled} is no dict of tensors; save the adapter with save_pretrained")
    return {name: tensor.called(name) for name, tensor in found.items()}


def split(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """A live PEFT model's state: the base's tensors under their plain names, and by adapter name
    its tensors under the names of PEFT's files (peft/utils/save_and_load.py).

    What wrapped modules had before training is dropped where the state also has what they have
    now: the base holds it.
    """
    bares = {name.removeprefix(PREFIX) for name in tensors}
    base: dict[str, Tensor] = {}
    adapters: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix(PREFIX)
        # PEFT's files repeat a saved module under both of these names.
        again = re.sub(r"\.(original_module|modules_to_save)(?=\.\w+$)", "", bare)
        if ".trainable_tokens_original." in bare or (again != bare and again in bares):
            continue
        found = _of_adapter(bare)
        if found is not None:
            adapter, own = found
            adapters.setdefault(adapter, {})[own] = tensor.called(own)
            continue
        base[plain_name(name)] = tensor.called(plain_name(name))
    return base, adapters


def plain_name(name: str) -> str:
    """Of a base's tensor in a live PEFT model."""
    bare = name.removeprefix(PREFIX)
    return re.sub(r"\.(token_adapter|base_layer|original_module)(?=\.)", "", bare)


def _of_adapter(name: str) -> tuple[str, str] | None:
    """The adapter's name, and the tensor's in a file. Some trainers save without the name."""
    if re.fullmatch(NAMELESS, name):
        return "default", PREFIX + name
    for pattern, own in (
        (r"(.+)\.modules_to_save\.([^.]+)\.(.+)", r"\1.\3"),
        (r"(.+\.lora_magnitude_vector)\.([^.]+)(?:\.weight)?()", r"\1"),
        (r"(.+\.lora_[AB])\.([^.]+)\.(weight|bias)", r"\1.\3"),
        (r"(.+\.(?:lora_\w+|trainable_tokens_delta))\.([^.]+)((?:\..+)?)", r"\1\3"),
    ):
        if match := re.fullmatch(pattern, name):
            return match[2], PREFIX + match.expand(own)
    return None
