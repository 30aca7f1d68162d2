"""Which parameters of a model its files lack. Training and export both compare."""

from __future__ import annotations

import re
from collections.abc import Set
from typing import Any


def tied_names(model: Any) -> dict[str, str]:
    """Parameter → the parameter that it is tied to, by the config."""
    return dict(model.get_expanded_tied_weights_keys(all_submodels=True))


def missing_parameters(model: Any, names: Set[str]) -> list[str]:
    """The parameters of a transformers model that `names` lacks, and that loading would fill at
    random: neither tied to one that is there nor optional for its class."""
    groups = [{target, source} for target, source in tied_names(model).items()]
    provided = set().union(*(group for group in groups if group & names))
    return _required(model, dict(model.named_parameters()).keys() - names - provided)


def missing_buffers(model: Any, names: Set[str]) -> list[str]:
    """The persistent buffers of a transformers model that `names` lacks and that are not optional
    for its class."""
    persistent = model.state_dict().keys() & dict(model.named_buffers()).keys()
    return _required(model, persistent - names)


def _required(model: Any, names: Set[str]) -> list[str]:
    optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return sorted(
        name for name in names if not any(re.search(pattern, name) for pattern in optional)
    )
