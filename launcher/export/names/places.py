"""Which class's names the tensors of a checkpoint or an adapter have: the folder's or the text
model's that was trained alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from launcher.folders.model_config import NESTED
from launcher.io.adapter import plain_name
from launcher.io.model_class import (
    causal_class,
    config_of,
    find_places,
    named_class,
    text_class,
)
from launcher.io.places import Places
from launcher.io.readers.found import FoundModel


def places_in(config: dict[str, Any], trained: str | None = None) -> Places | None:
    """Where the model that was trained is in the composite that the contents of a `config.json`
    describe; None if it is not a composite, or if the composite itself was trained.

    `trained`: the class that a checkpoint records; None: any class that could have been trained
    alone, and the names of the tensors decide.
    """
    if trained is not None and trained in config.get("architectures", ()):
        return None
    if (values := _composite(config)) is None:
        return None
    import transformers

    recorded = getattr(transformers, trained, None) if trained else None
    candidates = [recorded] if recorded else [causal_class(values), text_class(values)]
    return _first_places(values, candidates)


def text_places(config: dict[str, Any], same_logits: bool = False) -> Places | None:
    """Where the text model that AutoModelForCausalLM loads alone is in the composite that the
    contents of a `config.json` describe; None if there is no such. `same_logits`: see
    `find_places`."""
    values = _composite(config)
    return None if values is None else _first_places(values, [text_class(values)], same_logits)


def _composite(config: dict[str, Any]) -> Any:
    """The configuration of transformers' class for a composite; None: it is none, or of its own
    code."""
    if NESTED not in config:
        return None
    import transformers

    model_type = config.get("model_type", "null")
    if model_type not in transformers.CONFIG_MAPPING:
        return None
    return config_of(config)


def _first_places(values: Any, candidates: list[Any], same_logits: bool = False) -> Places | None:
    if (outer := named_class(values)) is None:
        return None
    others = [inner for inner in candidates if inner not in (None, outer)]
    try:
        found = (find_places(inner, outer, values, same_logits) for inner in others)
        return next(filter(None, found), None)
    except Exception:  # a class that cannot be built here, for lack of a library: names stay
        return None


def in_composite(found: FoundModel, places: Places | None) -> FoundModel:
    """`found`, a model without its adapter, by the composite's names. It is returned as it is if it
    has them, or if there is not a composite (`places` is None)."""
    outer = places.renaming(found.tensors) if places and found.tensors else None
    if outer is None:
        return found
    tensors = {outer(name): tensor for name, tensor in found.tensors.items()}
    aliases = {outer(name): outer(other) for name, other in found.aliases.items()}
    trained = found.trained and frozenset(outer(plain_name(n)) for n in found.trained)
    renamed = {name: tensor.renamed(name) for name, tensor in tensors.items()}
    return replace(found, tensors=renamed, aliases=aliases, trained=trained, partial=True)
