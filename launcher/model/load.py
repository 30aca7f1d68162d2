"""Build a model without its weights, and read the weights a slice at a time.

No rank ever holds the whole model: parameters are made on meta, sharded there, and each rank then
reads its own rows from the safetensors files.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from launcher.boxes import boxes
from launcher.config.model import ModelConfig
from launcher.errors import UserError
from launcher.model.attention import attention_for
from launcher.model.folder import the_safetensors_file


class SafetensorsFolder:
    """The tensors of a model folder by name, read slice by slice."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._added: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
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

    def shape(self, name: str) -> torch.Size:
        return torch.Size(self._open(self._file_of[name]).get_slice(name).get_shape())

    def add(self, name: str, left: torch.Tensor, right: torch.Tensor) -> None:
        """From now on the matrix `name` [m, n] is read with left [m, r] @ right [r, n] added, in
        fp32: the reader rounds once."""
        self._added.setdefault(name, []).append((left, right))

    def read(self, name: str, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """The box of `shape` at `offsets`; only its bytes are read when it is a range of rows."""
        file = self._open(self._file_of[name])
        box = tuple(slice(at, at + size) for at, size in zip(offsets, shape, strict=True))
        tensor: torch.Tensor = file.get_slice(name)[box] if shape else file.get_tensor(name)
        for left, right in self._added.get(name, ()):
            tensor = tensor.float() + left[box[0]] @ right[:, box[1]]
        return tensor

    def whole(self, name: str) -> torch.Tensor:
        shape = tuple(self.shape(name))
        return self.read(name, (0,) * len(shape), shape)

    def read_run(self, name: str, begin: int, count: int) -> torch.Tensor:
        """Elements [begin, begin + count) of the flattened tensor, 1-d; only their bytes are read,
        but for the rows where the run begins and ends."""
        found = boxes(begin, count, tuple(self.shape(name)))
        parts = [self.read(name, offsets, sizes).flatten() for offsets, sizes in found]
        return torch.cat(parts) if parts else torch.empty(0, dtype=self.dtype(name))

    def dtype(self, name: str) -> torch.dtype:
        if name in self._added:
            return torch.float32
        file = self._open(self._file_of[name])
        empty: torch.Tensor = (
            file.get_slice(name)[:0] if self.shape(name) else file.get_tensor(name)
        )
        return empty.dtype

    def _open(self, file: str) -> safe_open:
        if file not in self._open_files:
            self._open_files[file] = safe_open(self.folder / file, framework="pt")
        return self._open_files[file]


class Weights:
    """Where each parameter of a model on meta comes from.

    Parameters are found by the module that holds them, not by name: adapters and `fully_shard`
    rename and replace parameters, but never the modules of the model.
    """

    def __init__(self, folder: SafetensorsFolder, model: nn.Module) -> None:
        self.folder = folder
        self.slots: list[tuple[nn.Module, str, str]] = []  # module, attribute, name on disk
        for name, _ in model.named_parameters():  # tied parameters appear once
            module_name, _, attribute = name.rpartition(".")
            self.slots.append((model.get_submodule(module_name), attribute, name))


def build_model(
    config: ModelConfig, folder: Path, seed: int, dtype: torch.dtype
) -> tuple[nn.Module, Weights | None]:
    """The model of `folder` and where its weights are.

    Parameters are on meta, to be filled from the returned weights. Models whose parameters are not
    laid out on disk as in memory (fused experts, renamed prefixes) are read whole on every rank,
    and None is returned for the weights. `dtype` is that of the arithmetic: buffers are made in it.
    """
    torch.manual_seed(seed)
    try:
        architecture = AutoConfig.from_pretrained(
            folder, trust_remote_code=config.trust_remote_code
        )
        files = SafetensorsFolder(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.name_or_path={folder} cannot be read: {error}") from error
    options = {
        "attn_implementation": attention_for(config.attention, architecture),
        "trust_remote_code": config.trust_remote_code,
    }
    # Buffers are made for real: rotary frequencies are in no file.
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = AutoModelForCausalLM.from_config(architecture, dtype=dtype, **options)
    model.tie_weights()  # building on meta loses the tie
    if _same_layout(model, files):
        return model, Weights(files, model)
    print(f"{folder}: stored in another layout than in memory; read whole on every rank")
    stored = torch.float32 if dtype == torch.float32 else "auto"  # masters lose nothing
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=stored, **options)
    return model, None


def _same_layout(model: nn.Module, files: SafetensorsFolder) -> bool:
    """Whether every tensor on disk is a parameter in memory and the other way round. Persistent
    buffers and tensors that the model does not know (scales, other heads) make it another one."""
    parameters = dict(model.named_parameters())
    aliases = model.state_dict().keys() - parameters.keys() - dict(model.named_buffers()).keys()
    persistent = model.state_dict().keys() & dict(model.named_buffers()).keys()
    return (
        not persistent
        and parameters.keys() <= files.names <= parameters.keys() | aliases
        and all(files.shape(name) == parameter.shape for name, parameter in parameters.items())
    )
