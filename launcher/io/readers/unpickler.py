"""Reads a pickle whose author is not trusted: nothing is executed, and memory and time are bounded
by the size of the pickle.

It is Python's own unpickler in Python. The one in C reserves memory for any index and any length
that a few bytes of a pickle can name.
"""

from __future__ import annotations

import gc
import io
import pickle
import struct
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from launcher.errors import UserError
from launcher.folders.brief import brief
from launcher.io.readers.unpickle import (
    ByteRanges,
    Inert,
    Sealed,
    Storage,
    find_class,
    find_storage,
    resolve_references,
)

DAMAGED = (
    pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError,
    ImportError, MemoryError, RecursionError, RuntimeError, AssertionError, OverflowError,
    struct.error,
)  # fmt: skip
MAX_INTEGER_BYTES = 16
MAX_KEY = 1 << 60  # integers beyond the modulus of hash() can collide on purpose
# What a call may copy, in elements: honest pickles copy each element about once.
COPIES_PER_BYTE, FREE_COPIES = 10, 10_000
SETS, MAPPINGS = (set, frozenset), (dict, OrderedDict, defaultdict)
SIZED = {str, bytes, tuple, list, dict, set, frozenset}


FindStorage = Callable[[Any], Storage]  # persistent id → storage


@contextmanager
def named_damage(path: Path, kind: str) -> Iterator[None]:
    """Turn the errors that contents of other types cause into a UserError that names `path`, which
    should be a `kind`."""
    try:
        yield
    except UserError:
        raise
    except DAMAGED as error:
        raise UserError(
            f"{path} is not a {kind}, or is damaged: {type(error).__name__}: {error!s:.200}"
        ) from error


def load(path: Path, data: bytes, storages: ByteRanges) -> Any:
    """The object that the pickle `data` contains. Raises UserError if it is damaged, or names a
    class that checkpoints do not need. `path`: the file, for messages."""
    return load_from(path, io.BytesIO(data), len(data), partial(find_storage, path, storages))


def load_from(path: Path, stream: Any, size: int, find: FindStorage) -> Any:
    """The object that begins at the position of `stream`, which is then behind it. `size`: the
    bytes of the stream."""
    was_enabled = gc.isenabled()
    gc.disable()  # it would look through all objects again and again, which takes longer than this
    try:
        return resolve_references(_Unpickler(path, stream, size, find).load())
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path}: {error}") from None
    except DAMAGED as error:
        raise UserError(f"{path} is damaged: {type(error).__name__}: {error!s:.200}") from error
    finally:
        if was_enabled:
            gc.enable()


_PYTHON_UNPICKLER: Any = vars(pickle)["_Unpickler"]
_STOP: Any = vars(pickle)["_Stop"]


class _Unpickler(_PYTHON_UNPICKLER):
    """Strings and memo take no more memory than the stream has bytes, since both are read in
    Python."""

    def __init__(self, path: Path, stream: Any, size: int, find: FindStorage) -> None:
        super().__init__(stream)
        self.path, self.persistent_load = path, find
        self.copies_left = COPIES_PER_BYTE * size + FREE_COPIES

    def load(self) -> Any:
        """Without the buffer for frames, which are only a hint how much to read at once."""
        self.read, self.readline = self._file_read, self._file_readline
        self.metastack: list[list[Any]] = []
        self.stack: list[Any] = []
        self.append = self.stack.append
        self.proto = 0
        read, operations = self.read, OPERATIONS
        try:
            while True:
                operations[read(1)](self)
        except _STOP as stop:
            return stop.value

    def find_class(self, module: str, name: str) -> Any:
        return find_class(self.path, module, name)

    def charge(self, copies: int) -> None:
        """Count elements that are copied. Raises ValueError if they are too many."""
        self.copies_left -= copies
        if self.copies_left < 0:
            raise ValueError("it copies its contents many times, which no checkpoint does")

    def key(self, key: Any) -> Any:
        """`key`, if its hash is known at once: that of a nested tuple can take for ever."""
        parts = key if type(key) is tuple else (key,)
        self.charge(len(parts))
        for part in parts:
            if type(part) is int and -MAX_KEY < part < MAX_KEY:
                continue
            if not isinstance(part, str | bytes | bool | None | Inert | torch.dtype):
                raise ValueError(f"a key of a dict or set is a {type(part).__name__}")
        return key


def _frame(self: _Unpickler) -> None:
    self.read(8)


def _put(index: int, self: _Unpickler) -> None:
    self.memo[index] = self.stack[-1]


def _long(size_bytes: int, self: _Unpickler) -> None:
    size = int.from_bytes(self.read(size_bytes), "little")
    if size > MAX_INTEGER_BYTES:
        raise ValueError(f"an integer of {size} bytes")
    self.append(int.from_bytes(self.read(size), "little", signed=True))


def _dict(self: _Unpickler) -> None:
    items = self.pop_mark()
    pairs = zip(items[::2], items[1::2], strict=True)
    self.append({self.key(key): value for key, value in pairs})


def _set_item(self: _Unpickler) -> None:
    value, key = self.stack.pop(), self.stack.pop()
    _mapping(self)[self.key(key)] = value


def _set_items(self: _Unpickler) -> None:
    items = self.pop_mark()
    mapping = _mapping(self)
    for key, value in zip(items[::2], items[1::2], strict=True):
        mapping[key if type(key) is str else self.key(key)] = value


def _mapping(self: _Unpickler) -> dict[Any, Any]:
    mapping = self.stack[-1]
    if not isinstance(mapping, dict):
        raise TypeError(f"an item of a {type(mapping).__name__} is set")
    return mapping


def _add_items(self: _Unpickler) -> None:
    items = self.pop_mark()
    if type(self.stack[-1]) is not set:
        raise TypeError(f"items are added to a {type(self.stack[-1]).__name__}")
    self.stack[-1].update(map(self.key, items))


def _frozen_set(self: _Unpickler) -> None:
    items = self.pop_mark()  # changes `append`
    self.append(frozenset(map(self.key, items)))


def _append(self: _Unpickler) -> None:
    value = self.stack.pop()
    _list(self).append(value)


def _appends(self: _Unpickler) -> None:
    items = self.pop_mark()
    _list(self).extend(items)


def _list(self: _Unpickler) -> list[Any]:
    items = self.stack[-1]
    if type(items) is not list:
        raise TypeError(f"items are appended to a {type(items).__name__}")
    return items


def _reduce(self: _Unpickler) -> None:
    arguments = self.stack.pop()
    function = self.stack[-1]
    if type(arguments) is not tuple:
        raise TypeError(f"a call has a {type(arguments).__name__} as its arguments")
    self.charge(1 + sum(len(each) for each in arguments if type(each) in SIZED))
    if function in SETS:
        arguments = ([self.key(each) for items in arguments for each in items],)
    elif function in MAPPINGS:
        function, arguments = dict, ([*_pairs(self, arguments)],)
    self.stack[-1] = function(*arguments)


def _pairs(self: _Unpickler, arguments: tuple[Any, ...]) -> Iterator[tuple[Any, Any]]:
    """The items that a dict is created with. A defaultdict's factory is dropped."""
    for items in arguments:
        if isinstance(items, dict | list | tuple):
            pairs = items.items() if isinstance(items, dict) else items
            yield from ((self.key(key), value) for key, value in pairs)


def _new_object(self: _Unpickler) -> None:
    arguments = self.stack.pop()
    if self.stack[-1] is not Inert or type(arguments) is not tuple:
        raise TypeError(f"a {brief(self.stack[-1])} is created without a call")
    self.stack[-1] = Inert(*arguments)


def _new_object_with_keywords(self: _Unpickler) -> None:
    self.stack.pop()
    _new_object(self)


def _build(self: _Unpickler) -> None:
    """Attributes of a dict, such as a state dict's `_metadata`, are dropped."""
    state, target = self.stack.pop(), self.stack[-1]
    if isinstance(target, Inert | Sealed):
        target.__setstate__(state)
    elif not isinstance(target, dict):
        raise TypeError(f"the state of a {type(target).__name__} is set")


Operation = Callable[[_Unpickler], None]
_REFUSED = b"io\x82\x83\x84\x96\x97\x98"  # INST, OBJ, extensions, out-of-band buffers
OPERATIONS: dict[bytes, Operation] = {
    bytes([code]): operation
    for code, operation in _PYTHON_UNPICKLER.dispatch.items()
    if code not in _REFUSED
} | {
    pickle.FRAME: _frame,
    pickle.BINPUT: lambda self: _put(self.read(1)[0], self),
    pickle.LONG_BINPUT: lambda self: _put(int.from_bytes(self.read(4), "little"), self),
    pickle.LONG1: lambda self: _long(1, self),
    pickle.LONG4: lambda self: _long(4, self),
    pickle.DICT: _dict,
    pickle.SETITEM: _set_item,
    pickle.SETITEMS: _set_items,
    pickle.ADDITEMS: _add_items,
    pickle.FROZENSET: _frozen_set,
    pickle.APPEND: _append,
    pickle.APPENDS: _appends,
    pickle.REDUCE: _reduce,
    pickle.NEWOBJ: _new_object,
    pickle.NEWOBJ_EX: _new_object_with_keywords,
    pickle.BUILD: _build,
}
