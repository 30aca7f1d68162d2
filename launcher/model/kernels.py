"""Liger's Triton kernels in place of a model's own RMSNorm, gated MLP and rotary positions."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from importlib import metadata
from typing import Any

from torch import nn
from transformers.activations import ACT2FN

from launcher.errors import UserError

INSTEAD = "→ training.kernels=torch"
OURS = {"cross_entropy": False, "fused_linear_cross_entropy": False}  # launcher.model.head
ACTIVATIONS = {"swiglu": "silu", "geglu": "gelu_pytorch_tanh"}  # what Liger's MLPs compute


def use_kernels(model: Any, choice: str) -> str:
    """Have `model`, possibly on meta, compute by `training.kernels`; what is done in words.

    Modules get another forward and stay what they are: call it before the method, whose adapters
    such a forward finds in the places of the linear layers. Liger also changes the modelling file
    of the architecture, rotary positions there alone: for all models of this process.

    Raises UserError for an architecture that Liger does not know.
    """
    if choice == "torch":
        return "torch's"
    from liger_kernel.transformers import monkey_patch

    liger, kind = f"Liger {metadata.version('liger-kernel')}", model.config.model_type
    known = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    if kind not in known:
        raise UserError(f"training.kernels=liger: {liger} has no kernels for {kind} {INSTEAD}")
    other = _other_activations(model, inspect.signature(known[kind]).parameters)
    try:
        monkey_patch._apply_liger_kernel_to_instance(model, **OURS, **dict.fromkeys(other, False))
    except Exception as error:  # it was made for another transformers, and half of it may be done
        raise UserError(
            f"training.kernels=liger: {liger} cannot change {type(model).__name__} "
            f"({type(error).__name__}: {error}) {INSTEAD}"
        ) from error
    kept = [f"not the MLP, whose activation is {name}" for name in other.values()]
    kept += ["not the experts"] * _keep_experts(model)
    if not (changed := _changed(model)):
        raise UserError(
            f"training.kernels=liger: {liger} changes nothing of {type(model).__name__} {INSTEAD}"
        )
    return f"{liger}: {', '.join([*changed, *kept])}"


def _other_activations(model: nn.Module, offered: Any) -> dict[str, str]:
    """Liger's MLPs that would compute something else than the model's, which it does not look at:
    its option → the model's activation."""
    names = ("act_fn", "activation_fn")
    found = {type(m) for n, m in model.named_modules() if n.rpartition(".")[2] in names}
    return {
        option: " and ".join(sorted(kind.__name__ for kind in strange))
        for option, name in ACTIVATIONS.items()
        if option in offered and (strange := found - {type(ACT2FN[name])})
    }


def _keep_experts(model: nn.Module) -> bool:
    """Give experts back the forward of their class: Liger's is one kernel for all of them, which
    Triton's interpreter cannot run, so that no test here has seen it."""
    changed = [each for each in model.modules() if _name(each).endswith("Experts")]
    for module in changed:
        del module.forward, module._get_name
    return bool(changed)


def _changed(model: nn.Module) -> list[str]:
    """What Liger has changed, as it is seen afterwards."""
    names = Counter(name for module in model.modules() if (name := _name(module)))
    changed = [f"{count} × {name}" for name, count in sorted(names.items())]
    modelling = sys.modules[type(model).__module__]
    if _is_ligers(getattr(modelling, "apply_rotary_pos_emb", None)):
        changed.append(f"rotary positions of {modelling.__name__} in this whole process")
    return changed


def _name(module: nn.Module) -> str:
    """The class of Liger whose forward `module` was given; empty: it has its own."""
    forward: Any = vars(module).get("forward")
    return str(forward.__qualname__).partition(".")[0] if _is_ligers(forward) else ""


def _is_ligers(function: Any) -> bool:
    return getattr(function, "__module__", "").startswith("liger_kernel.")
