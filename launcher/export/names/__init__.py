"""The names of a model's tensors in memory and on disk."""

from launcher.export.names.key_mapping import Naming, build_on_meta, find_naming, naming_of_config
from launcher.export.names.places import in_composite, places_in, text_places
from launcher.export.names.precision import kept_in_fp32

__all__ = [
    "Naming",
    "build_on_meta",
    "find_naming",
    "in_composite",
    "kept_in_fp32",
    "naming_of_config",
    "places_in",
    "text_places",
]
