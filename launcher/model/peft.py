"""What is used of PEFT, loaded without bitsandbytes. Everything here takes PEFT from this module.

PEFT loads bitsandbytes wherever it is installed, for layers over bitsandbytes' own modules, and
bitsandbytes loads torch's compiler: a quarter of the time in which a rank's libraries load, and
45 MB. None of it is used: quantised layers are `launcher.model.quantised`'s, plain `nn.Linear`s to
PEFT. Where bitsandbytes is loaded already, or PEFT itself, nothing is changed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def hidden(package: str) -> Iterator[None]:
    """Within, `package` is not installed, as far as imports can tell."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


with hidden("bitsandbytes"):
    from peft import LoraConfig as PeftConfig
    from peft import PeftModel, get_peft_model, get_peft_model_state_dict
    from peft.import_utils import is_bnb_available
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import Linear as PeftLinear
    from peft.utils.other import ModulesToSaveWrapper

    is_bnb_available()  # PEFT keeps the answer, and does not ask again when it makes layers

__all__ = [
    "LoraLayer",
    "ModulesToSaveWrapper",
    "PeftConfig",
    "PeftLinear",
    "PeftModel",
    "get_peft_model",
    "get_peft_model_state_dict",
]
