"""The parts of PEFT that Shardway uses, imported without bitsandbytes. Import them from here only.

If bitsandbytes is installed, PEFT imports it for its layers over bitsandbytes' own modules, and
bitsandbytes imports torch's compiler: 45 MB and a quarter of the import time of a rank. None of it
is used: quantized layers are those of `launcher.model.quantized_linear`, which PEFT treats as plain
`nn.Linear`. If bitsandbytes or PEFT is already imported, this module changes nothing.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def hide_package(package: str) -> Iterator[None]:
    """Make imports of `package` fail inside the context, unless it is already imported."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


with hide_package("bitsandbytes"):
    from peft import LoraConfig as PeftConfig
    from peft import PeftModel, get_peft_model, get_peft_model_state_dict
    from peft.import_utils import is_bnb_available
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import Linear as PeftLinear
    from peft.tuners.lora.layer import ParamWrapper
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
    from peft.utils import transformers_weight_conversion as conversion
    from peft.utils.other import ModulesToSaveWrapper

    is_bnb_available()  # PEFT caches the result and does not check again when it makes layers

# Of PEFT's own making: PeftModel asks transformers 5 for this attribute by its former name.
warnings.filterwarnings(
    "ignore", message=r"`is_gradient_checkpointing` is deprecated", category=FutureWarning
)


def linear_layers(model: Any) -> list[str]:
    """The linear layers of `model` that PEFT's all-linear selects: all but the head."""
    config = PeftConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    found = set(_maybe_include_all_linear_layers(config, model).target_modules or ())
    return [name for name, _ in model.named_modules() if name in found]


def shares_adapted_weights(model: PeftModel) -> bool:
    """Whether several adapted layers have one weight: blocks that a model repeats."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    weights = [id(getattr(layer.get_base_layer(), "weight", layer)) for layer in layers]
    return len({*weights}) < len(weights)


def renamed_targets(model: nn.Module) -> set[str]:
    """The names of modules that PEFT takes for those of transformers 4, and renames."""
    model_type = getattr(model.config, "model_type", None)
    pattern = conversion._MODEL_TO_CONVERSION_PATTERN.get(model_type)
    return set(conversion._MOE_TARGET_MODULE_MAPPING.get(pattern, ()))


@contextmanager
def keep_target_names() -> Iterator[None]:
    """Inside the context, PEFT takes target names as they are: they are of transformers 5."""
    convert = conversion.convert_peft_config_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = convert


__all__ = [
    "LoraLayer",
    "ModulesToSaveWrapper",
    "ParamWrapper",
    "PeftConfig",
    "PeftLinear",
    "PeftModel",
    "get_peft_model",
    "get_peft_model_state_dict",
    "keep_target_names",
    "linear_layers",
    "renamed_targets",
    "shares_adapted_weights",
]
