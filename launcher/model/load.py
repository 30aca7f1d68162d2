"""Build a model without its weights, and read the weights a slice at a time.

No rank ever holds the complete model: parameters are created on the meta device and sharded there,
and each rank then reads its own rows from the safetensors files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from launcher.config.schema.model import ModelConfig
from launcher.errors import UserError
from launcher.folders.model import CONFIG, single_weights_file
from launcher.folders.model_config import read_model_config
from launcher.folders.tensor_entries import INDEX, file_entries, read_weight_map
from launcher.io.completeness import tied_names
from launcher.model.attention import choose_attention
from launcher.model.completeness import check_loaded, check_names, check_ties
from launcher.model.lazy_weight import FileWeight, InParts, LazyWeight, alone
from launcher.model.trainable import refuse_untrainable

MB = 1e6


class SafetensorsFolder:
    """The tensors of a model folder by name."""

    def __init__(self, folder: Path) -> None:
        """Raises UserError if a file is damaged, if the index lists a file or a tensor that is
        missing, or if there are several files and no index."""
        self.folder = folder
        self._bytes_read = [0]
        self._open_files: dict[str, safe_open] = {}
        index = folder / INDEX
        if index.is_file():
            self._file_of = read_weight_map(index)
            files = sorted(set(self._file_of.values()))
            missing = sorted(file for file in files if not (folder / file).is_file())
            if missing:
                raise UserError(f"{index} lists files that are missing: {', '.join(missing)}")
            names = {file: file_entries(folder / file).keys() for file in files}
            if lost := [name for name, file in self._file_of.items() if name not in names[file]]:
                raise UserError(
                    f"{index} lists {lost[0]} in {self._file_of[lost[0]]}, which does not contain "
                    "it: the index is stale"
                )
        else:
            path = single_weights_file(folder)
            self._file_of = dict.fromkeys(file_entries(path), path.name)

    @property
    def names(self) -> set[str]:
        return set(self._file_of)

    @property
    def bytes_read(self) -> int:
        """Bytes that this process has read; bytes that it read twice count twice."""
        return self._bytes_read[0]

    @property
    def nbytes(self) -> int:
        """Size of the files."""
        return sum((self.folder / file).stat().st_size for file in set(self._file_of.values()))

    def __getitem__(self, name: str) -> FileWeight:
        return FileWeight(self._open(self._file_of[name]), name, self._bytes_read)

    def _open(self, file: str) -> safe_open:
        if file not in self._open_files:
            self._open_files[file] = safe_open(self.folder / file, framework="pt")
        return self._open_files[file]


@dataclass
class Slot:
    """A parameter, and the weight that will fill it.

    The parameter is found by its module, not by its name: adapters and `fully_shard` rename and
    replace parameters, but never the modules of the model.
    """

    module: nn.Module
    attribute: str
    source: LazyWeight

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.get_parameter(self.attribute)


class Tensors(Protocol):
    """The tensors of a model by name."""

    @property
    def nbytes(self) -> int: ...

    @property
    def bytes_read(self) -> int: ...

    def __getitem__(self, name: str) -> LazyWeight: ...


class Weights:
    """The weight that will fill each parameter of a model on the meta device."""

    def __init__(self, folder: Tensors, model: nn.Module, in_parts: InParts = alone) -> None:
        """`in_parts`: how the ranks share work on the weights."""
        self.folder = folder
        self.in_parts = in_parts
        self.slots: list[Slot] = []
        for name, _ in model.named_parameters():  # tied parameters appear once
            module_name, _, attribute = name.rpartition(".")
            self.slots.append(Slot(model.get_submodule(module_name), attribute, folder[name]))

    def describe(self) -> str:
        """A log line for the end of loading."""
        folder = self.folder
        return (
            f"this rank has read {folder.bytes_read / MB:,.1f} MB of {folder.nbytes / MB:,.1f} MB"
        )

    def by_parameter(self) -> dict[int, Slot]:
        """id of a parameter, as it is now → its slot; a tied head is found by its embedding."""
        return {id(slot.parameter): slot for slot in self.slots}


def build_model(
    config: ModelConfig,
    folder: Path,
    seed: int,
    dtype: torch.dtype,
    packed: bool = False,
    in_parts: InParts = alone,
) -> tuple[nn.Module, Weights | None]:
    """Build the model of `folder` with its parameters on the meta device, and find its weights.

    If the names or shapes of parameters differ between the files and memory (fused experts, renamed
    prefixes), every rank reads the complete model instead, and the weights are None. `dtype` is
    that of the computation; buffers are created in it. `packed`: sequences will have several
    documents. `in_parts`: how the ranks share work on the weights. Raises UserError for a folder
    that cannot be read or lacks parameters of the model.
    """
    torch.manual_seed(seed)
    model = model_on_meta(config, folder, dtype, packed)
    try:
        files = SafetensorsFolder(folder)
    except OSError as error:
        raise _unreadable(folder, error) from error
    check_ties(model, files, folder)
    if has_same_layout(model, files):
        return model, Weights(files, model, in_parts)
    check_names(model, files, folder)
    print(
        f"{folder}: the tensors on disk differ from the parameters in memory; every rank reads the "
        "whole model"
    )
    load_dtype = torch.float32 if dtype == torch.float32 else "auto"  # keeps master weights exact
    ties, attention = tied_names(model), choose_attention(config.attention, model.config, packed)
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=load_dtype,
        attn_implementation=attention,
        trust_remote_code=config.trust_remote_code,
        ignore_mismatched_sizes=True,  # the check names them
        output_loading_info=True,
    )
    check_loaded(ties, loaded, info, folder)
    return loaded, None


def model_on_meta(
    config: ModelConfig, folder: Path, dtype: torch.dtype, packed: bool = False
) -> Any:
    """The model that `folder`/config.json describes, with all parameters on the meta device.

    Buffers are real, because rotary frequencies are not in the files. Raises UserError for a model
    that cannot be built.
    """
    code = config.trust_remote_code
    try:
        if (folder / CONFIG).is_file():
            read_model_config(folder / CONFIG)
        architecture = AutoConfig.from_pretrained(folder, trust_remote_code=code)
    except Exception as error:  # each class checks its values in its own way
        raise _unreadable(folder, error) from error
    refuse_untrainable(architecture, folder)
    attention = choose_attention(config.attention, architecture, packed)
    try:
        with init_empty_weights(include_buffers=False), no_init_weights():
            model = AutoModelForCausalLM.from_config(
                architecture, dtype=dtype, attn_implementation=attention, trust_remote_code=code
            )
    except UserError:
        raise
    except Exception as error:  # not a causal model, not with this attention, or of other values
        raise UserError(
            f"{folder} with model.attention={config.attention} cannot be built: {error}"
        ) from error
    model.tie_weights()  # building on the meta device loses the tie
    return model


def _unreadable(folder: Path, error: Exception) -> UserError:
    return UserError(f"model.name_or_path={folder} cannot be read: {error or repr(error)}")


def has_same_layout(model: nn.Module, files: SafetensorsFolder) -> bool:
    """Whether the tensors on disk and the parameters in memory are the same.

    With persistent buffers, or tensors that the model does not have (scales, other heads), they are
    not.
    """
    parameters = dict(model.named_parameters())
    aliases = model.state_dict().keys() - parameters.keys() - dict(model.named_buffers()).keys()
    persistent = model.state_dict().keys() & dict(model.named_buffers()).keys()
    return (
        not persistent
        and parameters.keys() <= files.names <= parameters.keys() | aliases
        and all(files[name].shape == parameter.shape for name, parameter in parameters.items())
    )
