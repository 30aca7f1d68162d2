"""What a reader finds: a model's tensors by name, and what the format says of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from launcher.export.tensor import Tensor


@dataclass(frozen=True)
class Found:
    tensors: dict[str, Tensor]
    aliases: dict[str, str] = field(default_factory=dict)  # tied name → the name that is in tensors
    notes: tuple[str, ...] = ()  # sentences for the person: what was dropped or assumed
    trained: frozenset[str] | None = None  # names that an optimizer stepped; None: not known
