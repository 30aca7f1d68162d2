"""Tensors without memory, and the count of what they would take.

A fake tensor (torch's FakeTensorMode) has a shape, a dtype and a storage of a size, and no values.
The code that trains runs on them as it is; `Live` counts the storages that are alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launcher.errors import UserError

aten = torch.ops.aten
PLAIN = (torch.Tensor, torch.nn.Parameter, FakeTensor)  # others are made of them, as DTensor is


class Live(TorchDispatchMode):
    """Bytes of the storages that operations have made, while they live: `now`, and the `peak` of
    those that are not `elsewhere`, which was in `peak_phase`. Set `phase` as the work goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.phase = self.peak_phase = "loading"
        self._sizes: dict[int, int] = {}  # by a storage's address
        self._elsewhere: Callable[[], Iterable[torch.Tensor]] = tuple
        self._apart: dict[int, int] = {}  # of what was elsewhere when it was last asked

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if not all(each in PLAIN for each in types):
            return NotImplemented  # it comes again, as operations on what it is made of
        result = operation(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and not each.is_meta:
                self._count(each.untyped_storage())
        return result

    def begin(self, elsewhere: Callable[[], Iterable[torch.Tensor]]) -> None:
        """Forget the peak, and count from now on without what `elsewhere` then gives."""
        self._elsewhere, self.peak = elsewhere, 0
        self._add(0)

    def apart(self) -> int:
        """Bytes that are elsewhere now."""
        self._apart = _storages(self._elsewhere())
        return sum(self._apart.values())

    @contextmanager
    def counting(self) -> Iterator[Live]:
        """FSDP2 frees gathered weights by resizing their storage, which is no operation."""
        resize = torch.UntypedStorage.resize_

        def counted(storage: torch.UntypedStorage, size: int) -> Any:
            if storage._cdata in self._sizes:
                self._add(size - self._sizes[storage._cdata])
                self._sizes[storage._cdata] = size
            return resize(storage, size)

        torch.UntypedStorage.resize_ = counted  # type: ignore[method-assign,assignment]
        try:
            with self:
                yield self
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]

    def _count(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address not in self._sizes:
            self._sizes[address] = storage.nbytes()
            self._add(storage.nbytes())
            weakref.finalize(storage, self._freed, address)

    def _freed(self, address: int) -> None:
        self._apart.pop(address, None)
        self._add(-self._sizes.pop(address))

    def _add(self, size: int) -> None:
        self.now += size
        # What is new elsewhere is asked for only where it could matter: it takes a while.
        if self.now - sum(self._apart.values()) > self.peak:
            here = self.now - self.apart()
            if here > self.peak:
                self.peak, self.peak_phase = here, self.phase


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Of the storages of `tensors`, each once."""
    return sum(_storages(tensors).values())


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Their sizes by address."""
    storages = (tensor.untyped_storage() for tensor in tensors if not tensor.is_meta)
    return {storage._cdata: storage.nbytes() for storage in storages}


class Fakes(FakeTensorMode):
    """Every tensor made inside is fake. A value that the host asks for is one: gradients are
    finite, weights can be quantised."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        # Its weak references to parameters would keep torch.utils.swap_tensors from swapping them.
        self.fake_tensor_converter.set_tensor_memo = lambda *_: None  # type: ignore[method-assign]

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if operation is aten._local_scalar_dense.default:
            return 1
        if operation in (aten.is_nonzero.default, aten.equal.default):
            return True
        if operation is aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            return self._experts(*args, **(kwargs or {}))
        try:
            return super().__torch_dispatch__(operation, types, args, kwargs or {})
        except DynamicOutputShapeException as error:
            raise UserError(
                f"this model cannot be planned: the size of what {error} gives depends on values"
            ) from error

    def _experts(self, left: Any, right: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A grouped product: torch knows the shape of its result in bf16 alone."""
        with self:
            halves = left.bfloat16(), right.bfloat16()
            product: torch.Tensor = aten._grouped_mm.default(*halves, *args, **kwargs)
            return product.to(left.dtype)
