"""Which modules FSDP2 gathers together and when, and along which dim it splits a tensor.

    unit                  gathered in forward          in backward
    input embedding       before it runs               not at all: its gradient needs no weight
    decoder layers        while the layer before runs  while the layer behind runs
    last norm and head    while the last layer runs    still there
    the rest (the root)   first                        still there
    what text does not    never                        never
    reach

If the head is tied to the embedding, both are in the root: one tensor, needed at either end of the
model, is kept from the first use to the last.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement

from launcher.distributed.shards import sharded_dim
from launcher.model.layers import decoder_layers
from launcher.model.text_path import beyond_text

MAX_PADDING = 0.1  # of a tensor, or of the model


def shard_units(model: nn.Module, frees: bool, options: dict[str, Any]) -> None:
    """Apply `fully_shard` with `options` to the units of `model`, the root excepted.

    `frees`: a layer is freed after its forward, and gathered again for its backward.
    """
    layers, unreached = decoder_layers(model), _shard_unreached(model, frees, options)
    for layer in layers:
        fully_shard(layer, reshard_after_forward=frees, **options)
    embedding, head = _ends(model)
    if embedding is not None:
        fully_shard(embedding, reshard_after_forward=frees, **options)
        # A wrapper, of an adapter for example, may do more than look rows up.
        _unit(embedding).set_unshard_in_backward(not isinstance(embedding, nn.Embedding))
    tail: list[nn.Module] = []
    if head is not None:
        units = [*unreached, *layers, head, *filter(None, [embedding])]
        rest = _owners_of_other_parameters(model, units)
        tail = [*rest, head] if len(rest) == 1 else [head]
        fully_shard(tail, reshard_after_forward=False, **options)
    for before, after in itertools.pairwise([*layers, *tail[:1]]):
        _unit(before).set_modules_to_forward_prefetch([_unit(after)])
        _unit(after).set_modules_to_backward_prefetch([_unit(before)])


def _shard_unreached(model: nn.Module, frees: bool, options: dict[str, Any]) -> list[nn.Module]:
    """Make a unit of each part that text does not reach, unless its parameters are ignored; return
    the parts."""
    parts, ignored = [*beyond_text(model).values()], options.get("ignored_params") or ()
    # When gradients are summed before they are reduced, FSDP2 casts those of a unit that has never
    # been gathered, and fails, if the dtype of the reduction is another.
    policy = replace(options["mp_policy"], reduce_dtype=None)
    for part in parts:
        if not all(parameter in ignored for parameter in part.parameters()):
            fully_shard(part, reshard_after_forward=frees, **options | {"mp_policy": policy})
    return parts


def placement_function(num_shards: int) -> Callable[[nn.Parameter], ShardPlacement]:
    """`shard_placement_fn` of `fully_shard`."""
    return lambda parameter: ShardPlacement(split_dim(tuple(parameter.shape), num_shards))


def split_dim(shape: tuple[int, ...], num_shards: int) -> int:
    """The dim along which a tensor of `shape` is split: its rows, unless it is a stack of matrices
    (experts) of which ⌈rows / shards⌉ a rank would be more than a tenth of padding.

    Then it is the first dim that `num_shards` divides, which FSDP2 requires of every dim but the
    rows. It costs a copy of the tensor in each gather and reduction. Vectors and matrices are split
    by rows in any case: those of few rows (routers, adapters) are small.
    """
    if len(shape) < 3 or -(-shape[0] // num_shards) * num_shards <= (1 + MAX_PADDING) * shape[0]:
        return 0
    return next((dim for dim, size in enumerate(shape) if size % num_shards == 0), 0)


def describe_padding(parameters: Iterable[nn.Parameter], num_shards: int) -> str | None:
    """A warning if the largest part of a rank, times `num_shards`, is more than a tenth above the
    size of the model; otherwise None.

    It is no error: results are right, and whether there is room for it `shardway plan` says.
    """
    padded = whole = worst = 0
    shape: list[int] = []
    for parameter in parameters:
        if not isinstance(parameter, DTensor):
            continue
        size = parameter.shape[sharded_dim(parameter)]
        padding = (-size % num_shards) * (parameter.nbytes // size)
        padded, whole = padded + padding, whole + parameter.nbytes
        if padding > worst:
            worst, shape = padding, list(parameter.shape)
    if padded <= MAX_PADDING * whole:
        return None
    extra = padded / num_shards
    wasted = f"{extra / 1e9:,.2f} GB" if extra >= 1e9 else f"{extra / 1e6:,.2f} MB"
    return (
        f"warning: the fullest rank holds {1 + padded / whole:.2f} times its share of the weights, "
        f"{wasted} too much, and as much again for gradients and each "
        f"moment if they are trained: tensors such as {'×'.join(map(str, shape))} cannot be split "
        f"into {num_shards} equal parts → strategy=zero3, which splits any tensor evenly, or "
        "strategy=hsdp with a strategy.shard_size that divides their first dim, or that of experts "
        "any dim"
    )


def _ends(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The input embedding and the output head; None for what is not a unit of its own."""
    transformer = cast(Any, model)
    try:
        embedding: nn.Module = transformer.get_input_embeddings()
    except NotImplementedError:  # transformers does not know where this class has it
        return None, None
    head: nn.Module | None = transformer.get_output_embeddings()
    inside = {*embedding.modules()}
    others = {p for m in model.modules() if m not in inside for p in m.parameters(recurse=False)}
    is_tied = not {*embedding.parameters()}.isdisjoint(others)
    return (None, None) if is_tied else (embedding, head)


def _owners_of_other_parameters(model: nn.Module, units: list[nn.Module]) -> list[nn.Module]:
    """The modules outside of `units` that have parameters of their own: usually the last norm."""
    inside = {module for unit in units for module in unit.modules()}
    return [
        module
        for module in model.modules()
        if module not in inside and next(module.parameters(recurse=False), None) is not None
    ]


def _unit(module: nn.Module) -> FSDPModule:
    assert isinstance(module, FSDPModule)
    return module
