"""Merges adapters into a model's tensors."""

from launcher.export.merge.model import Merged, merge
from launcher.io.adapter import Adapter, read_adapter, split_adapters

__all__ = ["Adapter", "Merged", "merge", "read_adapter", "split_adapters"]
