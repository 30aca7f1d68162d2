"""Builds a composite without the towers whose classes need a package that is not installed.

Text does not reach a tower, and its tensors are copied from the files: Gemma 3n trains and is
exported without timm, which computes its pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from launcher.errors import first_sentence


class AbsentTower(nn.Module):
    """In the place of a tower. It has no parameters, and computes nothing."""

    def __init__(self, reason: str) -> None:
        """`reason`: what is missing, as transformers says it."""
        super().__init__()
        self.reason = reason

    def forward(self, *_: Any, **__: Any) -> Any:
        raise ImportError(self.reason)


@contextmanager
def towers_may_be_absent() -> Iterator[None]:
    """Inside the context, a part of a composite that cannot be imported becomes an `AbsentTower`,
    unless it is a text model. Raises ImportError for the composite itself."""
    import transformers

    auto: Any = transformers.AutoModel
    original, build = vars(auto)["from_config"], auto.from_config

    def from_config(_: Any, /, config: Any, **options: Any) -> Any:
        try:
            return build(config, **options)
        except ImportError as error:
            if type(config) in transformers.AutoModelForCausalLM._model_mapping:
                raise
            return AbsentTower(first_sentence(error))

    auto.from_config = classmethod(from_config)
    try:
        yield
    finally:
        auto.from_config = original


def absent_towers(model: nn.Module) -> dict[str, str]:
    """Path of each absent tower → the package that is missing, in a sentence."""
    return {
        name: module.reason
        for name, module in model.named_modules()
        if isinstance(module, AbsentTower)
    }
