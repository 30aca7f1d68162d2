"""How the parameters of a model are made of the tensors in its files.

transformers renames tensors and combines them while it loads a model: experts become one tensor,
prefixes of composite models are dropped. Its own loader runs here on tensors without values, which
note what is done to them. The result says for each parameter which boxes of which stored tensors it
consists of, whatever the tables of transformers contain.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    convert_and_load_state_dict_in_model,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from launcher.errors import UserError, first_sentence
from launcher.io.completeness import missing_parameters
from launcher.io.places import Places
from launcher.io.weight_views import (
    DIFFERENT_SHAPES,
    Cut,
    Joined,
    LazyWeight,
    Permuted,
    Reshaped,
    different_shapes,
    stored_parts,
)

aten = torch.ops.aten
CPU = torch.device("cpu")


@dataclass
class Conversion:
    """What `find_sources` has found."""

    # A parameter or persistent buffer by its name in memory → the weight that it is read from. Of
    # tied parameters, those that the files have.
    sources: dict[str, LazyWeight] = field(default_factory=dict)
    # The dtype in which `from_pretrained` would keep it: that of the model, or fp32 where its class
    # says that it needs it.
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    # Name in memory, shape in the files, shape in memory
    mismatched: list[tuple[str, torch.Size, torch.Size]] = field(default_factory=list)
    # Name in memory → why no parameter can be made of the tensors in the files, of which some are
    # missing or have other shapes
    unfit: dict[str, str] = field(default_factory=dict)
    # Stored tensors that the model does not have: vision towers, heads for several tokens
    unused: set[str] = field(default_factory=set)
    # Why some parameters cannot be read in slices: the first of them, and what transformers does
    obstacle: str | None = None


def find_sources(model: Any, stored: Mapping[str, LazyWeight], dtype: torch.dtype) -> Conversion:
    """The sources of the parameters and persistent buffers of `model`, a transformers model.

    `stored`: the tensors of its folder by name. Nothing is read, and `model` stays as it is.
    `dtype`: that in which `from_pretrained` would load it. Raises UserError for tensors with which
    transformers fails.
    """
    found, weights = Conversion(), dict(stored.items())
    symbols = {name: Symbol(weight, weight.dtype) for name, weight in weights.items()}
    config = LoadStateDictConfig(
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model),
        ignore_mismatched_sizes=True,
    )
    with _restored(model, found), _quiet():
        try:
            info, _ = convert_and_load_state_dict_in_model(model, symbols, config)
        except Exception as error:  # of any kind: the tables are made for published files
            raise UserError(
                f"transformers cannot read the files as {type(model).__name__} "
                f"({type(error).__name__}: {first_sentence(error)}): they have a parameter twice, "
                "in two layouts, for example → the files as they were published"
            ) from error
    found.mismatched = sorted(info.mismatched_keys)
    for name, trace in info.conversion_errors.items():
        if different := re.search(f"^ValueError: ({DIFFERENT_SHAPES}.*)$", trace, re.MULTILINE):
            found.unfit[name] = different[1]
    if info.conversion_errors:
        name, trace = min(info.conversion_errors.items())
        operation = re.search(r"Error: (\w+) on tensors", trace)
        found.obstacle = f"{name}, made by {operation[1] if operation else 'transformers'},"
    found.unused = _unused(found, weights)
    return found


def find_sources_in(
    places: Places, composite: Any, model: Any, stored: Mapping[str, LazyWeight], dtype: torch.dtype
) -> Conversion:
    """`find_sources` for a `model` that is part of a composite, by the composite's conversions.

    `composite`: on meta. transformers has no conversions that read the composite's files into the
    classes of most text models.
    """
    weights = dict(stored.items())
    whole, names = find_sources(composite, weights, dtype), model.state_dict().keys()
    found = Conversion(
        sources={n: whole.sources[o] for n in names if (o := places.outer(n)) in whole.sources},
        dtypes={n: whole.dtypes[o] for n in names if (o := places.outer(n)) in whole.dtypes},
        mismatched=[
            (places.inner(name), in_files, in_memory)
            for name, in_files, in_memory in whole.mismatched
            if places.contains(name)
        ],
        unfit={places.inner(n): why for n, why in whole.unfit.items() if places.contains(n)},
    )
    if missing_parameters(model, found.sources.keys()):
        found.obstacle = whole.obstacle
    found.unused = _unused(found, weights)
    return found


def _unused(found: Conversion, stored: Mapping[str, LazyWeight]) -> set[str]:
    read = {id(part) for source in found.sources.values() for part in stored_parts(source)}
    return {name for name, weight in stored.items() if id(weight) not in read}


def published_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The tensors, on meta, with which transformers would save `model`, by their names in files.

    `model` is on meta. Raises what transformers raises for a model that it cannot save.
    """
    state = {name: value.to("meta") for name, value in model.state_dict().items()}
    return dict(revert_weight_conversion(model, state))


class Symbol(torch.Tensor):
    """A tensor without values, which knows the weight that it stands for.

    `dtype` is the one that transformers has asked for; the weight keeps that of the files.
    Operations that do more than move values raise NotImplementedError.
    """

    weight: LazyWeight

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, weight: LazyWeight, dtype: torch.dtype) -> Symbol:
        symbol = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=dtype, device=CPU)
        symbol.weight = weight
        return symbol

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        operation = OPERATIONS.get(function.overloadpacket)
        if operation is None:
            raise NotImplementedError(f"{function} computes values")
        options = dict(kwargs or {})
        dtype = options.pop("dtype", None) or next(
            leaf.dtype for leaf in tree_leaves(args) if isinstance(leaf, Symbol)
        )
        for layout in ("layout", "device", "pin_memory", "non_blocking", "memory_format"):
            options.pop(layout, None)
        result = operation(*args, **options)
        if isinstance(result, list):
            return [Symbol(weight, dtype) for weight in result]
        return Symbol(result, dtype)


def _same(symbol: Symbol) -> LazyWeight:
    return symbol.weight


def _cat(symbols: list[Symbol], dim: int = 0) -> LazyWeight:
    return Joined([symbol.weight for symbol in symbols], dim % symbols[0].ndim)


def _stack(symbols: list[Symbol], dim: int = 0) -> LazyWeight:
    if len({each.shape for each in symbols}) > 1:
        raise different_shapes(each.weight for each in symbols)
    dim %= symbols[0].ndim + 1
    shapes = [(*each.shape[:dim], 1, *each.shape[dim:]) for each in symbols]
    slices = [Reshaped(each.weight, shape) for each, shape in zip(symbols, shapes, strict=True)]
    return Joined(slices, dim)


def _slice(
    symbol: Symbol, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> LazyWeight:
    if step != 1:
        raise NotImplementedError("a slice with a step")
    begin, stop, _ = slice(start, end).indices(symbol.shape[dim])
    return _narrow(symbol, dim, begin, max(stop - begin, 0))


def _narrow(symbol: Symbol, dim: int, begin: int, size: int) -> LazyWeight:
    dim %= symbol.ndim
    offsets, shape = [0] * symbol.ndim, list(symbol.shape)
    offsets[dim], shape[dim] = begin, size
    return Cut(symbol.weight, tuple(offsets), tuple(shape))


def _split(symbol: Symbol, size: int, dim: int = 0) -> list[LazyWeight]:
    whole = symbol.shape[dim]
    return _split_sizes(symbol, [min(size, whole - at) for at in range(0, whole, size)], dim)


def _split_sizes(symbol: Symbol, sizes: list[int], dim: int = 0) -> list[LazyWeight]:
    begins = [sum(sizes[:index]) for index in range(len(sizes))]
    return [_narrow(symbol, dim, at, size) for at, size in zip(begins, sizes, strict=True)]


def _select(symbol: Symbol, dim: int, index: int) -> LazyWeight:
    dim %= symbol.ndim
    shape = (*symbol.shape[:dim], *symbol.shape[dim + 1 :])
    return Reshaped(_narrow(symbol, dim, index % symbol.shape[dim], 1), shape)


def _unbind(symbol: Symbol, dim: int = 0) -> list[LazyWeight]:
    return [_select(symbol, dim, index) for index in range(symbol.shape[dim])]


def _transpose(symbol: Symbol, first: int, second: int) -> LazyWeight:
    dims = list(range(symbol.ndim))
    dims[first], dims[second] = dims[second], dims[first]
    return Permuted(symbol.weight, tuple(dims))


def _permute(symbol: Symbol, dims: list[int]) -> LazyWeight:
    return Permuted(symbol.weight, tuple(dim % symbol.ndim for dim in dims))


def _view(symbol: Symbol, shape: list[int]) -> LazyWeight:
    known = -torch.Size(shape).numel() if -1 in shape else 1
    sizes = tuple(symbol.numel() // known if size == -1 else size for size in shape)
    return Reshaped(symbol.weight, sizes)


def _squeeze(symbol: Symbol, dims: int | list[int]) -> LazyWeight:
    chosen = {dim % symbol.ndim for dim in ([dims] if isinstance(dims, int) else dims)}
    kept = (size for dim, size in enumerate(symbol.shape) if dim not in chosen or size != 1)
    return Reshaped(symbol.weight, tuple(kept))


def _unsqueeze(symbol: Symbol, dim: int) -> LazyWeight:
    dim %= symbol.ndim + 1
    return Reshaped(symbol.weight, (*symbol.shape[:dim], 1, *symbol.shape[dim:]))


# The operations that only move values. A Symbol has the strides of a contiguous tensor, so torch
# reduces reshape, contiguous, flatten and chunk to these.
OPERATIONS: dict[Any, Callable[..., LazyWeight | list[LazyWeight]]] = {
    aten.alias: _same, aten.detach: _same, aten.clone: _same, aten._to_copy: _same,
    aten.cat: _cat, aten.stack: _stack, aten.slice: _slice, aten.select: _select,
    aten.split: _split, aten.split_with_sizes: _split_sizes, aten.unbind: _unbind,
    aten.transpose: _transpose, aten.permute: _permute, aten.view: _view,
    aten._unsafe_view: _view, aten.squeeze: _squeeze, aten.unsqueeze: _unsqueeze,
}  # fmt: skip


@contextmanager
def _restored(model: Any, found: Conversion) -> Iterator[None]:
    """Move the Symbols that were loaded into `model` to `found`, and put back what was there."""
    state = model.state_dict(keep_vars=True)
    try:
        yield
    finally:
        for name, original in state.items():
            path, _, attribute = name.rpartition(".")
            module = model.get_submodule(path)
            place = module._parameters if attribute in module._parameters else module._buffers
            if isinstance(loaded := place.get(attribute), Symbol):
                found.sources[name], found.dtypes[name] = loaded.weight, loaded.dtype
                place[attribute] = original


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bar."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
