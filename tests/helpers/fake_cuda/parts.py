"""The parts of a model whose tensors travel together, and which of them a message has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

SMALL = 100_000  # strategy.persistence_threshold: zero3 does not shard smaller parameters
# Embedding and head are of one size: a unit of FSDP2 has the norm with the head.
OUTSIDE = (
    ("embedding", "norm", "head"),
    ("norm", "head"),
    ("embedding", "norm"),
    ("embedding", "head"),
    ("embedding",),
    ("norm",),
    ("head",),
)
LAYER = "layer"
LARGE, SMALL_ONES = "large parameters", "small parameters"
WHOLE = ("model", LARGE, SMALL_ONES, "matrices", "vectors")


class Size(NamedTuple):
    """Elements of the parameters of a part."""

    floating: int
    quantized: int  # packed
    trained: int
    tensors: int  # not elements: the number of parameters

    def __add__(self, other: Any) -> Size:
        return Size(*(mine + its for mine, its in zip(self, other, strict=True)))


NOTHING = Size(0, 0, 0, 0)


def parts_of(model: Any) -> dict[str, Size]:
    """Name → size of the parts of `model`, which a method has prepared and no strategy has changed:
    embedding, norm, head, `layer 0`, `experts 0`, …, and parameters of the model by their kind."""
    from launcher.model.layers import decoder_layers

    layers = decoder_layers(model)
    outside = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    parts = {name: size_of(module.parameters()) for name, module in outside.items()}
    for number, layer in enumerate(layers):
        parts[f"{LAYER} {number}"] = size_of(layer.parameters())
        experts = [p for name, p in layer.named_parameters() if ".experts." in name]
        if experts:
            parts[f"experts {number}"] = size_of(experts)
            rest = [p for name, p in layer.named_parameters() if ".experts." not in name]
            parts[f"{LAYER} without experts {number}"] = size_of(rest)
    owned = {id(p) for module in (*layers, *outside.values()) for p in module.parameters()}
    everything = list(model.parameters())
    parts["norm"] = size_of(p for p in everything if id(p) not in owned)
    parts["matrices"] = size_of(p for p in everything if p.ndim > 1)
    parts["vectors"] = size_of(p for p in everything if p.ndim == 1)
    parts[SMALL_ONES] = size_of(p for p in everything if p.numel() <= SMALL)
    parts[LARGE] = size_of(p for p in everything if p.numel() > SMALL)
    parts["model"] = size_of(everything)
    return parts


def size_of(parameters: Iterable[Any]) -> Size:
    total = NOTHING
    for parameter in parameters:
        floating = parameter.numel() if parameter.is_floating_point() else 0
        trained = parameter.numel() if parameter.requires_grad else 0
        total += Size(floating, parameter.numel() - floating, trained, 1)
    return total


def name_of(elements: int, dtype: str, parts: dict[str, Size], of_all: bool = False) -> str | None:
    """The part of the model that a message of `elements` has; None: no part is as large.

    FSDP2 sends tensors of several dtypes as bytes. `of_all`: only parameters of the whole model by
    their kind.
    """
    for name, size in _candidates(parts, of_all):
        if dtype != "uint8":
            whole = size.floating
        elif elements == size.quantized:
            return f"{name}: quantized weights"
        else:
            whole = 2 * size.floating + size.quantized
        if elements == whole:
            return name
        if elements == size.trained:
            return f"{name}: trained"
    return None


def _candidates(parts: dict[str, Size], of_all: bool) -> Iterator[tuple[str, Size]]:
    numbered = {name: size for name, size in parts.items() if name[-1].isdigit()}
    if not of_all:
        for names in OUTSIDE:
            yield " + ".join(names), sum((parts[name] for name in names), NOTHING)
        for name, size in numbered.items():
            yield name.rsplit(" ", 1)[0], size
    for name in WHOLE:
        yield name, parts[name]
