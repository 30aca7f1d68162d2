"""What adapters do to a model's tensors."""

from launcher.export.merge.adapter import Adapter, read_adapter, split
from launcher.export.merge.model import Merged, merge

__all__ = ["Adapter", "Merged", "merge", "read_adapter", "split"]
