"""Tensors without memory, and the memory that they would need.

A fake tensor (torch's FakeTensorMode) has a shape, a dtype and a storage with a size, but no
values. The training code runs on fake tensors unchanged, and `MemTracker` adds up the storages that
are alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from launcher.errors import UserError

aten = torch.ops.aten
# Other tensor types, such as DTensor, consist of tensors of these types.
PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter, FakeTensor)
DEVICE_OF = torch.ops.prim.device.default
HostTensors = Callable[[], Iterable[torch.Tensor]]


class MemTracker(TorchDispatchMode):
    """Counts the bytes of the storages that operations create, as long as they are alive.

    `current` includes all of them. `peaks` has the highest value in each phase, without the tensors
    in host memory, and with the bytes that `ahead` says. The caller sets `phase`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.phase: str = "loading"
        self.peaks: dict[str, int] = {}  # by phase
        self.ahead: Callable[[], int] = lambda: 0  # bytes to add, of what is not made here
        self._sizes: dict[int, int] = {}  # address of a storage → bytes
        self._host_tensors: HostTensors = tuple
        self._host_sizes: dict[int, int] = {}  # the same in host memory, when last asked for

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and skipping it costs a tenth of a dry run

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is DEVICE_OF and _is_outside_of_kernels(args[0]):
            return args[0].fake_device  # more than half of all calls: do not ask the other modes
        if not all(tensor_type in PLAIN_TYPES for tensor_type in types):
            return NotImplemented  # called again for the operations on the plain tensors
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and not leaf.is_meta:
                self._count(leaf.untyped_storage())
        return result

    @property
    def peak(self) -> int:
        """The highest of `peaks`."""
        return max(self.peaks.values(), default=0)

    @property
    def peak_phase(self) -> str:
        """The first phase that reached `peak`."""
        return max(self.peaks, key=lambda phase: self.peaks[phase])

    def exclude_host_tensors(self, host_tensors: HostTensors) -> None:
        """Forget the peaks, and exclude the tensors that `host_tensors` returns from now on."""
        self._host_tensors = host_tensors
        self.peaks.clear()
        self._add(0)

    def host_bytes(self) -> int:
        """Bytes in host memory now."""
        self._host_sizes = _storage_sizes(self._host_tensors())
        return sum(self._host_sizes.values())

    @contextmanager
    def track(self) -> Iterator[MemTracker]:
        """Count inside this context. FSDP2 frees gathered weights by resizing their storage, which
        is not an operation, so `resize_` is patched."""
        resize = torch.UntypedStorage.resize_

        def counted_resize(storage: torch.UntypedStorage, size: int) -> Any:
            if storage._cdata in self._sizes:
                self._add(size - self._sizes[storage._cdata])
                self._sizes[storage._cdata] = size
            return resize(storage, size)

        torch.UntypedStorage.resize_ = counted_resize  # type: ignore[method-assign,assignment]
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
            weakref.finalize(storage, self._on_free, address)

    def _on_free(self, address: int) -> None:
        self._host_sizes.pop(address, None)
        self._add(-self._sizes.pop(address))

    def _add(self, size: int) -> None:
        self.current += size
        # Listing the host tensors is slow, so do it only if there may be a new peak.
        highest, now = self.peaks.setdefault(self.phase, 0), self.current + self.ahead()
        if now - sum(self._host_sizes.values()) > highest:
            self.peaks[self.phase] = max(highest, now - self.host_bytes())


def _is_outside_of_kernels(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is fake, and no kernel runs on it, for which it is on meta."""
    return isinstance(tensor, FakeTensor) and not tensor.fake_mode.in_kernel_invocation


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """The bytes of the storages of `tensors`, each storage once."""
    return sum(_storage_sizes(tensors).values())


def _storage_sizes(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Address of a storage → bytes."""
    storages = (tensor.untyped_storage() for tensor in tensors if not tensor.is_meta)
    return {storage._cdata: storage.nbytes() for storage in storages}


class FakeTensors(FakeTensorMode):
    """Every tensor that is created inside is fake. If the host asks for a value, it is 1 or True:
    gradients are finite, and weights can be quantized."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        # The converter's weak references to parameters would make torch.utils.swap_tensors fail.
        self.fake_tensor_converter.set_tensor_memo = lambda *_: None  # type: ignore[method-assign]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as MemTracker

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is aten._local_scalar_dense.default:
            return 1
        if func in (aten.is_nonzero.default, aten.equal.default):
            return True
        if func is aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            return self._grouped_mm(*args, **(kwargs or {}))
        try:
            # What the super class calls, without its guard against Dynamo.
            return self.dispatch(func, types, args, kwargs or {})
        except DynamicOutputShapeException as error:
            raise UserError(
                f"this model cannot be planned: the size of the result of {error} depends on values"
            ) from error

    def _grouped_mm(
        self, left: torch.Tensor, right: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """A grouped matrix product in bf16: torch knows the shape of the result only there."""
        with self:
            product: torch.Tensor = aten._grouped_mm.default(
                left.bfloat16(), right.bfloat16(), *args, **kwargs
            )
            return product.to(left.dtype)
