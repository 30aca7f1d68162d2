"""The auxiliary loss of routers, by which experts are used evenly, as the family defines it.

transformers computes it in the model's forward, from the logits of all routers, with the function
`load_balancing_loss_func` of the model's module. Of padding it would know from an attention mask,
which Shardway does not give to the model, so the function gets the mask here.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import nn

from launcher.errors import UserError
from launcher.model.peft import PeftModel

FUNCTION = "load_balancing_loss_func"
COEFFICIENT = "router_aux_loss_coef"


@dataclass(frozen=True)
class RouterLoss:
    """How the auxiliary loss is computed, and what it is multiplied with."""

    coefficient: float
    module: ModuleType  # of the model's class

    @contextmanager
    def of_tokens(self, is_token: torch.Tensor) -> Iterator[None]:
        """Inside the context, the model's forward with `output_router_logits` computes `aux_loss`
        over the positions where `is_token` [rows, length] is True."""
        original = getattr(self.module, FUNCTION)
        signature = _signature(original)

        def masked(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.arguments["attention_mask"] = is_token
            return original(*bound.args, **bound.kwargs)

        setattr(self.module, FUNCTION, masked)
        try:
            yield
        finally:
            setattr(self.module, FUNCTION, original)


_signature = cache(inspect.signature)  # it would be read again in each micro-batch


def find_router_loss(model: nn.Module, choice: str) -> RouterLoss | None:
    """The auxiliary loss of `model` by `training.router_aux_loss`, None if it is off.

    Raises UserError if the model defines none, or no coefficient.
    """
    if choice == "off":
        return None
    bare: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    module = sys.modules[type(bare).__module__]
    # Models that compute it say so by the setting of transformers.
    computes = FUNCTION in vars(module) and "output_router_logits" in inspect.getsource(type(bare))
    if not computes:
        raise UserError(
            f"training.router_aux_loss={choice}: {type(bare).__name__} defines no auxiliary loss "
            "of routers → training.router_aux_loss=off"
        )
    if choice != "model":
        return RouterLoss(float(choice), module)
    coefficient = getattr(bare.config.get_text_config(), COEFFICIENT, None)
    if coefficient is None:
        raise UserError(
            f"training.router_aux_loss=model: the model's config.json has no {COEFFICIENT} → "
            "training.router_aux_loss=0.001"
        )
    return RouterLoss(float(coefficient), module)
