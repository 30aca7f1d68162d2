"""Recurrent layers (Mamba, gated delta rule, short convolutions): packed documents, and kernels.

A recurrent layer carries its state over the end of a document. In packed sequences it therefore
runs once for each document, alone: the state starts at zero, as it does without packing, whichever
kernel computes it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn

# Of a forward, for attention that keeps documents separate. A document alone needs none of them.
PACKING_ARGUMENTS = {
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "document_lengths",
    "max_length_k",
    "max_length_q",
}


@dataclass
class Documents:
    """The documents of the forward that runs, or whose backward runs."""

    lengths: tuple[int, ...] | None = None  # in the flattened [rows, length]


def recurrent_layers(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that convolve over the positions of a row.

    All recurrent layers of transformers begin with a depthwise causal convolution.
    """
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module not in inside and any(map(_is_over_positions, module.children())):
            found.append(module)
            inside.update(module.modules())
    return found


def _is_over_positions(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv1d) and 1 < module.groups == module.in_channels


def separate_documents(model: nn.Module) -> str | None:
    """Make the recurrent layers of `model` run once for each packed document; returns a description
    for the log, None without such layers.

    Call it before the method, which may wrap the model.
    """
    layers, documents = recurrent_layers(model), Documents()
    if not layers:
        return None
    model.forward = _noting_documents(model.forward, documents)
    for layer in layers:
        layer.forward = _one_by_one(layer.forward, documents)
    return f"{len(layers)} recurrent layers run once for each document"


def _noting_documents(forward: Callable[..., Any], documents: Documents) -> Callable[..., Any]:
    """`forward` with its documents noted, and without the arguments that its model does not take:
    one without attention has no positions."""
    names = inspect.signature(forward).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in names.values())
    dropped = set() if takes_any else {*PACKING_ARGUMENTS, "position_ids"} - names.keys()

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        documents.lengths = kwargs.get("document_lengths")
        return forward(*args, **{k: v for k, v in kwargs.items() if k not in dropped})

    return run


def _one_by_one(forward: Callable[..., Any], documents: Documents) -> Callable[..., Any]:
    names = inspect.signature(forward).parameters

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if documents.lengths is None:
            return forward(*args, **kwargs)
        bound = dict(zip(names, args, strict=False)) | kwargs
        hidden = bound[next(iter(names))]
        rows, length = hidden.shape[:2]
        alone = {name: value for name, value in bound.items() if name not in PACKING_ARGUMENTS}
        alone |= dict.fromkeys(bound.keys() & {"attention_mask"})
        parts, begin = [], 0
        for count in documents.lengths:
            row, first = divmod(begin, length)
            piece = _Piece(rows, length, row, slice(first, first + count))
            parts.append(forward(**{name: piece.of(value) for name, value in alone.items()}))
            begin += count
        return _joined(parts, rows)

    return run


@dataclass(frozen=True)
class _Piece:
    """A document: `positions` of `row`."""

    rows: int
    length: int
    row: int
    positions: slice

    def of(self, value: Any) -> Any:
        """The document's part of an argument: a tensor [rows, length, …], or several of them."""
        if isinstance(value, tuple):
            return tuple(map(self.of, value))
        if not isinstance(value, torch.Tensor) or value.shape[:2] != (self.rows, self.length):
            return value
        return value[self.row : self.row + 1, self.positions]


def _joined(parts: list[Any], rows: int) -> Any:
    """The outputs [1, n, …] of documents as [rows, length, …]; of a tuple, its first element."""
    if isinstance(parts[0], tuple):
        return (_joined([part[0] for part in parts], rows), *parts[-1][1:])
    flat = torch.cat(parts, 1)
    return flat.view(rows, flat.shape[1] // rows, *flat.shape[2:])


def describe_kernels(model: nn.Module) -> str | None:
    """What computes the recurrent layers of `model`, for the log: the packages whose kernels
    transformers has found, or its own torch code. None without such layers."""
    layers = recurrent_layers(model)
    if not layers:
        return None
    kinds = sorted({type(layer).__name__ for layer in layers})
    found = sorted({name for layer in layers for name in _packages(type(layer))})
    how = f"with kernels of {', '.join(found)}" if found else "by transformers' own torch code"
    return f"{len(layers)} of {', '.join(kinds)}, {how}"


def _packages(kind: type[nn.Module]) -> set[str]:
    """The packages outside of transformers whose functions the module of a class would call."""
    functions = vars(sys.modules[kind.__module__]).values()
    closures = [inspect.getclosurevars(f).nonlocals for f in functions if inspect.isfunction(f)]
    found = (each["implementation"] for each in closures if "implementation" in each)
    names = {str(getattr(each, "__module__", "")).partition(".")[0] for each in found}
    return names - {"transformers", "torch", ""}
