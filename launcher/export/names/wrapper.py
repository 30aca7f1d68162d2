"""Finds the module that a trainer put around the model: its name is before those of all tensors."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

from launcher.export.names.key_mapping import Naming


def find_wrapper(names: Collection[str], known: Collection[str]) -> str:
    """The prefix ("net.") without which `names` are among those of the model, `known`; "" if they
    are among them, or if no prefix that all have makes them so."""
    if not known or any(name in known for name in names):
        return ""
    fitting = (
        prefix
        for prefix in common_prefixes(names)
        if any(name.removeprefix(prefix) in known for name in names)
    )
    return next(fitting, "")


def known_names(naming: Naming) -> set[str]:
    """The names of the class's tensors in memory, and without the prefix of its body: files of some
    models lack that."""
    body = f"{naming.model.base_model_prefix}."
    return {*naming.shapes, *(name.removeprefix(body) for name in naming.shapes)}


def are_on_disk(names: Collection[str], naming: Naming) -> bool:
    """Whether the class's own conversions turn all `names` into those of its tensors: the files of
    some models (Inkling) have a prefix of their own."""
    patterns = [re.compile(p) for each in naming.conversions for p in each.source_patterns]
    return all(
        memory in naming.shapes and any(pattern.search(name) for pattern in patterns)
        for name, memory, *_ in naming.renamed(names)
    )


def common_prefixes(names: Iterable[str]) -> Iterator[str]:
    """The prefixes of whole parts that all names have, the shortest first."""
    parts = [name.split(".")[:-1] for name in names]
    for count, same in enumerate(zip(*parts, strict=False), start=1):
        if len({*same}) > 1:
            return
        yield ".".join(parts[0][:count]) + "."
