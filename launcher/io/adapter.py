"""Reads a PEFT adapter from its folder, or from the state of a PEFT model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.folders.adapter import read_settings
from launcher.io.readers.safetensors_file import read_header
from launcher.io.readers.torch_file import read_file
from launcher.io.readers.wrapper_prefixes import with_stripped_names
from launcher.io.tensor import Tensor

PREFIX = "base_model.model."
ADAPTER_NAME = "default"  # PEFT's name of an adapter that has none
PARAMETER_SUFFIX = r"\.(lora_|token_adapter\.|base_layer\.|weight$|bias$).*"  # after a module name
UNNAMED_TENSOR = (  # as in PEFT's files: without the adapter's name
    r".+\.(lora_[AB]\.(weight|bias)|lora_embedding_[AB]|lora_magnitude_vector|"
    r"token_adapter\.trainable_tokens_delta)"
)


@dataclass(frozen=True)
class Adapter:
    origin: Path  # for messages
    config: dict[str, Any]  # adapter_config.json
    tensors: dict[str, Tensor]  # by their names in PEFT's files, without the adapter's name


def read_adapter(folder: Path) -> Adapter:
    """Read adapter_config.json and adapter_model.safetensors (or .bin) in `folder`.

    Raises UserError if one of them is missing or damaged.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise UserError(f"{file} is missing; name a folder that PEFT's save_pretrained wrote")
    return Adapter(folder, read_settings(file), _tensors(folder))


def check_modules(adapter: Adapter, modules: Set[str]) -> None:
    """Raises UserError if the adapter adapts a module that is not one of its base's: PEFT ignores
    it without a message."""
    names = (name.removeprefix(PREFIX) for name in adapter.tensors)
    adapted = {re.sub(PARAMETER_SUFFIX, "", name) for name in names}
    if unknown := sorted(adapted - modules):
        raise UserError(
            f"{adapter.origin} adapts {unknown[0]}, which its base lacks: the adapter belongs to "
            "another model; name that model with --base DIR"
        )


def _tensors(folder: Path) -> dict[str, Tensor]:
    safetensors, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
    if safetensors.is_file():
        return with_stripped_names(read_header(safetensors), safetensors)[0]
    if not pickled.is_file():
        raise UserError(f"{safetensors} is missing; {folder} contains no adapter weights")
    content = read_file(pickled)
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise UserError(
            f"{pickled} is not a dict of tensors; save the adapter with save_pretrained"
        )
    return with_stripped_names(content, pickled)[0]


def split_adapters(
    tensors: dict[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Split the state of a PEFT model: (base tensors, adapter name → adapter tensors).

    Base tensors are under their plain names, adapter tensors under their names in PEFT's files
    (peft/utils/save_and_load.py). The original weights of a wrapped module are left out if the
    state also has the trained ones: the base model has them.
    """
    unprefixed = {name.removeprefix(PREFIX) for name in tensors}
    base: dict[str, Tensor] = {}
    adapters: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(PREFIX)
        # PEFT's files repeat a saved module under both of these names.
        repeated = re.sub(r"\.(original_module|modules_to_save)(?=\.\w+$)", "", short)
        if ".trainable_tokens_original." in short or (repeated != short and repeated in unprefixed):
            continue
        parsed = _parse_adapter_tensor(short)
        if parsed is not None:
            adapter, file_name = parsed
            adapters.setdefault(adapter, {})[file_name] = tensor.renamed(file_name)
            continue
        base[plain_name(name)] = tensor.renamed(plain_name(name))
    return base, adapters


def is_peft_state(names: Iterable[str], adapted: bool) -> bool:
    """Whether these are the names of a PEFT model's state, with an adapter that is not merged.

    `adapted`: whether it is known that there is an adapter; the models of some classes have LoRA
    of their own.
    """
    return any(
        f".{PREFIX}" in f".{name}" or (adapted and _parse_adapter_tensor(name)) for name in names
    )


def contains_base(names: Collection[str]) -> bool:
    """Whether a PEFT model's state has the base's weights, by the names of its tensors."""
    adapted = {name.partition(".lora_")[0] for name in names if ".lora_A." in name}
    weights = ({f"{module}.base_layer.weight", f"{module}.weight"} for module in adapted)
    return bool(adapted) and not any(each.isdisjoint(names) for each in weights)


def plain_name(name: str) -> str:
    """The base model's name of a base tensor in a PEFT model."""
    short = name.removeprefix(PREFIX)
    return re.sub(r"\.(token_adapter|base_layer|original_module)(?=\.)", "", short)


def _parse_adapter_tensor(name: str) -> tuple[str, str] | None:
    """(adapter name, tensor name in PEFT's files), or None for a tensor of the base.

    Some trainers save the tensors without the adapter's name: it is "default" then.
    """
    if re.fullmatch(UNNAMED_TENSOR, name):
        return ADAPTER_NAME, PREFIX + name
    for pattern, file_name in (
        (r"(.+)\.modules_to_save\.([^.]+)\.(.+)", r"\1.\3"),
        (r"(.+\.lora_magnitude_vector)\.([^.]+)(?:\.weight)?()", r"\1"),
        (r"(.+\.lora_[AB])\.([^.]+)\.(weight|bias)", r"\1.\3"),
        (r"(.+\.(?:lora_\w+|trainable_tokens_delta))\.([^.]+)((?:\..+)?)", r"\1\3"),
    ):
        if match := re.fullmatch(pattern, name):
            return match[2], PREFIX + match.expand(file_name)
    return None
