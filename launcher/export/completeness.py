"""Whether the tensors of a model folder are those of the class that its config.json names.

transformers fills a parameter that is missing with random values, and servers refuse the folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.export import names
from launcher.export.quantized.released import PART
from launcher.export.quantized.settings import quantization_of
from launcher.io.completeness import missing_parameters
from launcher.io.tensor import Tensor

LISTED = 3  # names in a message


def check_complete(
    folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """Compare names and shapes on disk with the class's, which is built without data.

    Returns a note if they cannot be compared. Raises UserError for a parameter that is missing or
    has another shape. `folder`: for messages.
    """
    if reason := _not_comparable(config, tensors):
        return (f"the tensors were not compared with those of the model: {reason}",)
    naming = names.naming_of_config(folder, config)
    memory = naming.to_memory(dict(tensors))
    missing = [
        name
        for name in missing_parameters(naming.model, memory.keys())
        if name not in naming.optional
    ]
    class_name = type(naming.model).__name__
    if missing:
        more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        unknown = sorted(memory.keys() - naming.shapes.keys())[:LISTED]
        renamed = f" (of other names: {', '.join(unknown)})" if unknown else ""
        raise UserError(
            f"{folder} lacks {', '.join(missing[:LISTED])}{more} of {class_name}, the class that "
            f"config.json names{renamed}; use the complete files of the model"
        )
    for name, shape in naming.shapes.items():
        if name in memory and memory[name].shape != shape:
            raise UserError(
                f"{folder}: {name} has the shape {list(memory[name].shape)}, but in {class_name} "
                f"by config.json it has {list(shape)}; use the config.json that belongs to the "
                "files"
            )
    return ()


def _not_comparable(config: dict[str, Any], tensors: Iterable[str]) -> str | None:
    """Why the class is not known here, None if it is."""
    import transformers

    if quantization_of(config) or any(PART.fullmatch(name) for name in tensors):
        return "they are quantized"
    if not config.get("architectures"):
        return "config.json names no class (architectures)"
    model_type, architecture = config.get("model_type"), config["architectures"][0]
    if model_type not in transformers.CONFIG_MAPPING or not hasattr(transformers, architecture):
        return f"transformers {transformers.__version__} does not have {architecture}"
    return None
