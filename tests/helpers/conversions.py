"""Conversions of tensors to Python numbers: each one waits for the tensor's device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch


class Conversion(NamedTuple):
    method: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@contextmanager
def recorded() -> Iterator[list[Conversion]]:
    """Record the conversions inside the block."""
    seen: list[Conversion] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "numpy"):
            original = getattr(torch.Tensor, name)

            def counted(
                self: torch.Tensor, *args: Any, _original: Any = original, _name: str = name
            ) -> Any:
                seen.append(Conversion(_name, self.dtype, tuple(self.shape)))
                return _original(self, *args)

            patch.setattr(torch.Tensor, name, counted)
        yield seen
