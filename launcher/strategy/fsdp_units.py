"""Which modules FSDP2 gathers together and when, and along which dim it splits a tensor.

    unit                  gathered in forward          in backward
    input embedding       before it runs               not at all: its gradient needs no weight
    decoder layers        while the layer before runs  while the layer behind runs
    last norm and head    while the last layer runs    still there
    the rest (the root)   first                        still there
    what text does not    never                        never
    reach

A parameter that two of them share is in the root, with the unit or the part of a layer that has it:
it is kept from the first use to the last. Examples are a head that is tied to the embedding, a bias
that the head shares with its parent, and an attention block that several layers share.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement

from launcher.distributed.shards import sharded_dim
from launcher.model.layers import decoder_layers
from launcher.model.text_part import non_text_modules

MAX_PADDING = 0.1  # of a tensor, or of the model


def shard_units(model: nn.Module, frees: bool, options: dict[str, Any]) -> None:
    """Apply `fully_shard` with `options` to the units of `model`, the root excepted.

    `frees`: a layer is freed after its forward, and gathered again for its backward.
    """
    layers, non_text = decoder_layers(model), _shard_non_text(model, frees, options)
    embedding, head = _ends(model)
    shared = _shared_parameters(model, [*layers, *filter(None, [embedding, head])])
    units = [part for layer in layers for part in _parts_apart(layer, shared)]
    for unit in units:
        fully_shard(unit, reshard_after_forward=frees, **options)
    if embedding is not None and shared.isdisjoint(embedding.parameters()):
        fully_shard(embedding, reshard_after_forward=frees, **options)
        _unit(embedding).set_unshard_in_backward(not _only_looks_up(embedding))
    tail: list[nn.Module] = []
    if head is not None and shared.isdisjoint(head.parameters()):
        others = [*non_text, *layers, head, *filter(None, [embedding])]
        rest = _owners_of_other_parameters(model, others)
        tail = [*rest, head] if len(rest) == 1 else [head]
        fully_shard(tail, reshard_after_forward=False, **options)
    for before, after in itertools.pairwise([*units, *tail[:1]]):
        _unit(before).set_modules_to_forward_prefetch([_unit(after)])
        _unit(after).set_modules_to_backward_prefetch([_unit(before)])


def _shard_non_text(model: nn.Module, frees: bool, options: dict[str, Any]) -> list[nn.Module]:
    """Make a unit of each part that text does not reach, unless its parameters are ignored; return
    the parts."""
    parts, ignored = non_text_modules(model), options.get("ignored_params") or ()
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
    """The input embedding and the output head; None where transformers does not know it."""
    transformer = cast(Any, model)
    try:
        return transformer.get_input_embeddings(), transformer.get_output_embeddings()
    except NotImplementedError:
        return None, None


def _shared_parameters(model: nn.Module, units: list[nn.Module]) -> set[nn.Parameter]:
    """The parameters that a unit shares with another one, or with what is outside of all units."""
    unit_of = {module: unit for unit in units for module in unit.modules()}
    users: defaultdict[nn.Parameter, set[nn.Module]] = defaultdict(set)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users[parameter].add(unit_of.get(module, model))
    return {parameter for parameter, found in users.items() if len(found) > 1}


def _parts_apart(layer: nn.Module, shared: set[nn.Parameter]) -> list[nn.Module]:
    """The layer, or its children without a shared parameter: the root then gathers the others."""
    if shared.isdisjoint(layer.parameters()):
        return [layer]
    parts = [(child, {*child.parameters()}) for child in layer.children()]
    return [child for child, own in parts if own and shared.isdisjoint(own)]


def _only_looks_up(embedding: nn.Module) -> bool:
    """Whether its backward needs no weight: a norm behind the table, or the wrapper of an adapter,
    would read one that is freed."""
    return isinstance(embedding, nn.Embedding) and len([*embedding.parameters()]) == 1


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
