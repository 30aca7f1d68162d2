"""How config.json, or the file that ModelOpt writes beside it, states a quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from launcher.folders.json_file import read_object
from launcher.folders.model import MODELOPT
from launcher.folders.model_config import NESTED

KEY = "quantization_config"


def read_quantization(folder: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """How the weights of a model folder are quantized: as config.json states it, or the file that
    ModelOpt writes beside it."""
    if (found := quantization_of(config)) is not None or not (folder / MODELOPT).is_file():
        return found
    stated = read_object(folder / MODELOPT).get("quantization")
    return {"quant_method": "modelopt", **(stated if isinstance(stated, dict) else {})}


def quantization_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """`quantization_config` of a model, or of the text model of a composite."""
    for level in (config, config.get(NESTED) or {}):
        if (found := level.get(KEY)) is not None:
            return dict(found)
    return None


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """`config` without `quantization_config`, also in that of the text model."""
    kept = {key: value for key, value in config.items() if key != KEY}
    if isinstance(text := kept.get(NESTED), dict) and KEY in text:
        kept[NESTED] = {key: value for key, value in text.items() if key != KEY}
    return kept


def is_plain_float8(config: dict[str, Any]) -> bool:
    """Whether config.json states that the values are FP8 without scales."""
    return str(config.get("dtype") or config.get("torch_dtype")).startswith("float8")


def stated_dtype(config: dict[str, Any]) -> torch.dtype | None:
    for level in (config, config.get(NESTED) or {}):
        name = level.get("dtype") or level.get("torch_dtype")
        if name in ("bfloat16", "float16", "float32"):
            return cast("torch.dtype", getattr(torch, name))
    return None
