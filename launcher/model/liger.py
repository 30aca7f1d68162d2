"""Liger's Triton kernels for RMSNorm, gated MLP and rotary positions."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Container
from importlib import metadata
from typing import Any

from torch import nn
from transformers.activations import ACT2FN

from launcher.errors import UserError

WAY_OUT = "→ training.kernels=torch"
# The loss is computed by launcher.model.chunked_loss.
DISABLED_KERNELS = {"cross_entropy": False, "fused_linear_cross_entropy": False}
LIGER_ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"}  # kernel: its activation


def use_kernels(model: Any, choice: str) -> str:
    """Apply the kernels of `training.kernels` to `model`, and return a description for the log.

    The model may be on the meta device. Modules get another forward but keep their classes. Call it
    before the method: such a forward then finds the adapters in place of the linear layers. Liger
    also changes the modeling file of the architecture (only this changes rotary positions), for all
    models of this process.

    Raises UserError for an architecture that Liger does not support.
    """
    if choice == "torch":
        return "torch's"
    from liger_kernel.transformers import monkey_patch

    liger, model_type = f"Liger {metadata.version('liger-kernel')}", model.config.model_type
    supported = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    if model_type not in supported:
        raise UserError(
            f"training.kernels=liger: {liger} has no kernels for {model_type} {WAY_OUT}"
        )
    other = _other_activations(model, inspect.signature(supported[model_type]).parameters)
    options = {**DISABLED_KERNELS, **dict.fromkeys(other, False)}
    try:
        monkey_patch._apply_liger_kernel_to_instance(model, **options)
    except Exception as error:  # may happen with another version of transformers, at any point
        raise UserError(
            f"training.kernels=liger: {liger} cannot change {type(model).__name__} "
            f"({type(error).__name__}: {error}) {WAY_OUT}"
        ) from error
    unchanged = [f"not the MLP, whose activation is {name}" for name in other.values()]
    unchanged += ["not the experts"] * _restore_experts(model)
    if not (changes := _describe_changes(model)):
        raise UserError(
            f"training.kernels=liger: {liger} changes nothing in {type(model).__name__} {WAY_OUT}"
        )
    return f"{liger}: {', '.join([*changes, *unchanged])}"


def _other_activations(model: nn.Module, options: Container[str]) -> dict[str, str]:
    """Liger's MLP options whose activation is not the model's, which Liger does not check: option →
    the model's activation."""
    names = ("act_fn", "activation_fn")
    activations = {type(m) for name, m in model.named_modules() if name.rpartition(".")[2] in names}
    return {
        option: " and ".join(sorted(activation.__name__ for activation in different))
        for option, name in LIGER_ACTIVATIONS.items()
        if option in options and (different := activations - {type(ACT2FN[name])})
    }


def _restore_experts(model: nn.Module) -> bool:
    """Give experts their original forward again, and return whether there are any.

    Liger's is one kernel for all experts. Triton's interpreter cannot run it, so no test covers it.
    """
    changed = [module for module in model.modules() if _liger_class(module).endswith("Experts")]
    for module in changed:
        del module.forward, module._get_name
    return bool(changed)


def _describe_changes(model: nn.Module) -> list[str]:
    """What Liger has changed, read from the model itself."""
    names = Counter(name for module in model.modules() if (name := _liger_class(module)))
    changes = [f"{count} × {name}" for name, count in sorted(names.items())]
    modeling = sys.modules[type(model).__module__]
    if _is_from_liger(getattr(modeling, "apply_rotary_pos_emb", None)):
        changes.append(f"rotary positions of {modeling.__name__} in this whole process")
    return changes


def _liger_class(module: nn.Module) -> str:
    """The Liger class whose forward `module` has; empty if it has its own."""
    forward: Any = vars(module).get("forward")
    return str(forward.__qualname__).partition(".")[0] if _is_from_liger(forward) else ""


def _is_from_liger(function: Any) -> bool:
    return getattr(function, "__module__", "").startswith("liger_kernel.")
