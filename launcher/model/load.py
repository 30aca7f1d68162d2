"""Build a model without its weights, and read the weights a slice at a time.

No rank ever holds the complete model: parameters are created on the meta device and sharded there,
and each rank then reads its own rows from the safetensors files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from launcher.config.schema.model import ModelConfig
from launcher.errors import UserError, first_sentence
from launcher.folders.model import CONFIG
from launcher.folders.model_config import read_model_config
from launcher.folders.quantization import quantization_of
from launcher.io.absent_towers import absent_towers, towers_may_be_absent
from launcher.io.completeness import missing_buffers, missing_parameters, tied_names
from launcher.io.conversion import Conversion, find_sources, find_sources_in
from launcher.io.model_class import (
    meta_model,
    named_class,
    places_of,
    remember_places,
)
from launcher.io.weight_views import LazyWeight, read_full
from launcher.model.architecture import find_class, unreadable
from launcher.model.attention import EAGER, choose_attention
from launcher.model.completeness import (
    check_loaded,
    check_ties,
    refuse_mismatched,
    refuse_missing,
    refuse_unfit,
)
from launcher.model.folder import MB, ModelTensors, SafetensorsFolder, describe_unused
from launcher.model.lazy_weight import InParts, alone


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

    If transformers computes values from those in the files, every rank reads the complete model
    instead, and the weights are None. `dtype` is that of the computation; buffers are created in
    it. `packed`: sequences will have several documents. `in_parts`: how the ranks share work on the
    weights. Raises UserError for a folder that cannot be read or lacks parameters of the model.
    Collective if ranks share the work.
    """
    torch.manual_seed(seed)
    model = model_on_meta(config, folder, dtype, packed)
    try:
        files = SafetensorsFolder(folder)
    except OSError as error:
        raise unreadable(folder, error) from error
    for path, reason in absent_towers(model).items():
        print(
            f"{folder}: {path} is left out ({reason}); text does not pass through it, and an "
            "export copies its tensors from the base"
        )
    conversion = find_weights(model, folder, files, dtype)
    obstacle = conversion.obstacle
    refuse_unfit(conversion.unfit, folder)
    if obstacle is None:
        tensors = ModelTensors(files, model, conversion)
        names = conversion.sources.keys() | {name for name, *_ in conversion.mismatched}
        lacking = [*missing_parameters(model, names), *missing_buffers(model, names)]
        refuse_missing(lacking, folder, conversion.unused)
        refuse_mismatched(conversion.mismatched, folder)
        check_ties(model, conversion.sources, folder, in_parts)
        _load_buffers(model, conversion)
        obstacle = _optional_parameter(model, tensors)
    if obstacle is None:
        if conversion.unused:
            print(describe_unused(folder, files, conversion.unused))
        if rounded := describe_rounded(model, conversion, dtype):
            print(f"{folder}: {rounded}")
        return model, Weights(tensors, model, in_parts)
    print(
        f"{folder}: {obstacle} cannot be read in slices; every rank reads the whole model, "
        f"{files.nbytes / MB:,.1f} MB"
    )
    return _load_whole(config, folder, model, dtype, packed), None


def find_weights(
    model: Any, folder: Path, stored: Mapping[str, LazyWeight], dtype: torch.dtype
) -> Conversion:
    """`find_sources` for the model of `folder`, whose weights may be quantized, and whose files may
    be those of a composite that contains the model."""
    found, places = find_sources(model, stored, dtype), places_of(model)
    if places is not None and missing_parameters(model, found.sources.keys()):
        architecture = AutoConfig.from_pretrained(folder)
        composite = meta_model(named_class(architecture), architecture)
        inside = find_sources_in(places, composite, model, stored, dtype)
        if len(inside.sources) > len(found.sources):
            found = inside
    settings = read_model_config(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if quantization_of(settings):
        found.obstacle = "a model with quantized weights"
    return found


def describe_rounded(model: nn.Module, conversion: Conversion, dtype: torch.dtype) -> str | None:
    """A log line about parameters that transformers would compute in fp32; None without any."""
    parameters, dtypes = dict(model.named_parameters()), conversion.dtypes
    kept = [name for name in dtypes if name in parameters and dtypes[name] != dtype]
    if not kept:
        return None
    needed, used = (str(each).removeprefix("torch.") for each in (dtypes[kept[0]], dtype))
    return (
        f"transformers computes {len(kept)} parameters, such as {kept[0]}, in {needed}, and these "
        f"ranks in {used} → precision=fp32 if it matters"
    )


def _load_whole(
    config: ModelConfig, folder: Path, model: Any, dtype: torch.dtype, packed: bool
) -> Any:
    """The model of `folder` with all its weights; `model` is the same one on meta."""
    load_dtype = torch.float32 if dtype == torch.float32 else "auto"  # keeps master weights exact
    ties, attention = tied_names(model), choose_attention(config.attention, model.config, packed)
    loader, places = _loader(config, model), places_of(model)
    if places is not None:
        ties = {places.outer(target): places.outer(source) for target, source in ties.items()}
        attention = EAGER  # of the composite, which computes nothing
    try:
        with towers_may_be_absent():
            loaded, info = loader.from_pretrained(
                folder,
                dtype=load_dtype,
                attn_implementation=attention,
                trust_remote_code=config.trust_remote_code,
                ignore_mismatched_sizes=True,  # the check names them
                output_loading_info=True,
            )
    except Exception as error:  # each conversion and quantization fails in its own way
        raise unreadable(folder, error) from error
    if places is None:
        check_loaded(ties, loaded, info, folder)
        return loaded
    missing = {name for name in info["missing_keys"] if places.contains(name)}
    mismatched = {each for each in info["mismatched_keys"] if places.contains(each[0])}
    check_loaded(ties, loaded, {"missing_keys": missing, "mismatched_keys": mismatched}, folder)
    state = loaded.state_dict()
    model.load_state_dict({n: state[places.outer(n)] for n in model.state_dict()}, assign=True)
    model.tie_weights()
    return model


def _loader(config: ModelConfig, model: Any) -> Any:
    """The class that reads the complete files of `model`'s folder."""
    if (places := places_of(model)) is not None:
        return getattr(transformers, places.outer_class)
    own_code = config.trust_remote_code and hasattr(model.config, "auto_map")
    return AutoModelForCausalLM if own_code else type(model)


def _load_buffers(model: nn.Module, conversion: Conversion) -> None:
    """Read the persistent buffers, which every rank keeps whole."""
    for name in conversion.sources.keys() & dict(model.named_buffers()).keys():
        path, _, attribute = name.rpartition(".")
        dtype = conversion.dtypes[name]
        value = read_full(conversion.sources[name]).to(dtype)
        model.get_submodule(path)._buffers[attribute] = value


def _optional_parameter(model: nn.Module, tensors: ModelTensors) -> str | None:
    """A parameter that the files lack and that transformers initializes, if there is one."""
    names = (name for name, _ in model.named_parameters())
    return next((f"{name}, missing in the files," for name in names if name not in tensors), None)


def model_on_meta(
    config: ModelConfig, folder: Path, dtype: torch.dtype, packed: bool = False
) -> Any:
    """The model that `folder`/config.json describes, with all parameters on the meta device.

    Buffers are real, because rotary frequencies are not in the files. Raises UserError for a model
    that cannot be built.
    """
    architecture, build, places = find_class(config, folder)
    attention = choose_attention(config.attention, architecture, packed)
    try:
        empty = init_empty_weights(include_buffers=False)
        with towers_may_be_absent(), empty, no_init_weights():
            model = build(dtype=dtype, attn_implementation=attention)
    except UserError:
        raise
    except Exception as error:  # not a causal model, not with this attention, or of other values
        reason = str(error)
        if isinstance(error, ImportError):
            reason = f"{first_sentence(error)} → install it for the ranks and for the export"
        raise UserError(
            f"{folder} with model.attention={config.attention} cannot be built: {reason}"
        ) from error
    model.tie_weights()  # building on the meta device loses the tie
    remember_places(model, places)
    return model
