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
    optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    return sorted(
        name
        for name in dict(model.named_parameters()).keys() - names - provided
        if not any(re.search(pattern, name) for pattern in optional)
    )
