"""The names of a model's tensors in memory and on disk."""

from launcher.export.names.key_mapping import Naming, build_on_meta, find_naming, naming_of_config

__all__ = ["Naming", "build_on_meta", "find_naming", "naming_of_config"]
