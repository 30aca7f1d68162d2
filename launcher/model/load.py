"""Build a model without its weights, and read the weights a slice at a time.

No rank ever holds the whole model: parameters are made on meta, sharded there, and each rank then
reads its own rows from the safetensors files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from launcher.config.model import ModelConfig
from launcher.errors import UserError
from launcher.model.attention import attention_for
from launcher.model.folder import the_safetensors_file
from launcher.model.stored import InFile, Stored

MB = 1e6


class SafetensorsFolder:
    """The tensors of a model folder by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tally = [0]
        self._open_files: dict[str, safe_open] = {}
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            self._file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
            lost = sorted(f for f in set(self._file_of.values()) if not (folder / f).is_file())
            if lost:
                raise UserError(f"{index} lists {', '.join(lost)}, which is not there")
        else:
            self._file_of = {
                name: path.name
                for path in [the_safetensors_file(folder)]
                for name in self._open(path.name).keys()  # noqa: SIM118 (no mapping)
            }

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    @property
    def bytes_read(self) -> int:
        """By this process; what it read twice counts twice."""
        return self._tally[0]

    @property
    def nbytes(self) -> int:
        return sum((self.folder / file).stat().st_size for file in set(self._file_of.values()))

    def __getitem__(self, name: str) -> InFile:
        return InFile(self._open(self._file_of[name]), name, self._tally)

    def _open(self, file: str) -> safe_open:
        if file not in self._open_files:
            self._open_files[file] = safe_open(self.folder / file, framework="pt")
        return self._open_files[file]


@dataclass
class Slot:
    """A parameter and what it is filled with.

    Parameters are found by the module that holds them, not by name: adapters and `fully_shard`
    rename and replace parameters, but never the modules of the model.
    """

    module: nn.Module
    attribute: str
    stored: Stored

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.get_parameter(self.attribute)


class Tensors(Protocol):
    """The tensors of a model by name."""

    @property
    def nbytes(self) -> int: ...

    @property
    def bytes_read(self) -> int: ...

    def __getitem__(self, name: str) -> Stored: ...


class Weights:
    """Where each parameter of a model on meta comes from."""

    def __init__(self, folder: Tensors, model: nn.Module) -> None:
        self.folder = folder
        self.slots: list[Slot] = []
        for name, _ in model.named_parameters():  # tied parameters appear once
            module_name, _, attribute = name.rpartition(".")
            self.slots.append(Slot(model.get_submodule(module_name), attribute, folder[name]))

    def describe(self) -> str:
        """For the log, when all is loaded."""
        folder = self.folder
        return (
            f"this rank has read {folder.bytes_read / MB:,.1f} MB of {folder.nbytes / MB:,.1f} MB"
        )

    def by_parameter(self) -> dict[int, Slot]:
        """id of a parameter, as it is now → its slot; a tied head is found by its embedding."""
        return {id(slot.parameter): slot for slot in self.slots}


def build_model(
    config: ModelConfig, folder: Path, seed: int, dtype: torch.dtype, packed: bool = False
) -> tuple[nn.Module, Weights | None]:
    """The model of `folder` and where its weights are.

    Parameters are on meta, to be filled from the returned weights. Models whose parameters are not
    laid out on disk as in memory (fused experts, renamed prefixes) are read whole on every rank,
    and None is returned for the weights. `dtype` is that of the arithmetic: buffers are made in it.
    `packed`: sequences will hold several documents.
    """
    torch.manual_seed(seed)
    model = model_on_meta(config, folder, dtype, packed)
    try:
        files = SafetensorsFolder(folder)
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(folder, error) from error
    if _same_layout(model, files):
        return model, Weights(files, model)
    print(f"{folder}: stored in another layout than in memory; read whole on every rank")
    stored = torch.float32 if dtype == torch.float32 else "auto"  # masters lose nothing
    attention = attention_for(config.attention, model.config, packed)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=stored,
        attn_implementation=attention,
        trust_remote_code=config.trust_remote_code,
    )
    return model, None


def model_on_meta(
    config: ModelConfig, folder: Path, dtype: torch.dtype, packed: bool = False
) -> Any:
    """The model that `folder`/config.json describes, all parameters on meta. Buffers are real:
    rotary frequencies are in no file. Raises UserError for one that cannot be built."""
    code = config.trust_remote_code
    try:
        architecture = AutoConfig.from_pretrained(folder, trust_remote_code=code)
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(folder, error) from error
    attention = attention_for(config.attention, architecture, packed)
    try:
        with init_empty_weights(include_buffers=False), no_init_weights():
            model = AutoModelForCausalLM.from_config(
                architecture, dtype=dtype, attn_implementation=attention, trust_remote_code=code
            )
    except (ImportError, ValueError) as error:  # no causal model, or one without this attention
        raise UserError(
            f"{folder} with model.attention={config.attention} cannot be built: {error}"
        ) from error
    model.tie_weights()  # building on meta loses the tie
    return model


def _unreadable(folder: Path, error: Exception) -> UserError:
    return UserError(f"model.name_or_path={folder} cannot be read: {error}")


def _same_layout(model: nn.Module, files: SafetensorsFolder) -> bool:
    """Whether every tensor on disk is a parameter in memory and the other way round. Persistent
    buffers and tensors that the model does not know (scales, other heads) make it another one."""
    parameters = dict(model.named_parameters())
    aliases = model.state_dict().keys() - parameters.keys() - dict(model.named_buffers()).keys()
    persistent = model.state_dict().keys() & dict(model.named_buffers()).keys()
    return (
        not persistent
        and parameters.keys() <= files.names <= parameters.keys() | aliases
        and all(files[name].shape == parameter.shape for name, parameter in parameters.items())
    )
