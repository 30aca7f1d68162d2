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
    from peft.utils.other import ModulesToSaveWrapper

    is_bnb_available()  # PEFT caches the result and does not check again when it makes layers

# Of PEFT's own making: PeftModel asks transformers 5 for this attribute by its former name.
warnings.filterwarnings(
    "ignore", message=r"`is_gradient_checkpointing` is deprecated", category=FutureWarning
)

__all__ = [
    "LoraLayer",
    "ModulesToSaveWrapper",
    "ParamWrapper",
    "PeftConfig",
    "PeftLinear",
    "PeftModel",
    "get_peft_model",
    "get_peft_model_state_dict",
]
