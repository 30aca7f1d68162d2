"""The result of a reader: a model's tensors by name, and what the format reports about them."""

from __future__ import annotations

from dataclasses import dataclass, field

from launcher.io.tensor import Tensor


@dataclass(frozen=True)
class FoundModel:
    tensors: dict[str, Tensor]
    aliases: dict[str, str] = field(default_factory=dict)  # tied name → the name in `tensors`
    notes: tuple[str, ...] = ()  # messages for the user: what was left out or assumed
    trained: frozenset[str] | None = None  # names that the optimizer updates; None: unknown
    partial: bool = False  # the other tensors of the model are those of the base
