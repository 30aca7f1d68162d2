"""How config.json, or the file that ModelOpt writes beside it, states a quantization. Imports no
torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    for level in (config, config.get(NESTED)):
        if isinstance(level, dict) and isinstance(found := level.get(KEY), dict):
            return dict(found)
    return None


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """`config` without `quantization_config`, also in that of the text model."""
    kept = {key: value for key, value in config.items() if key != KEY}
    if isinstance(text := kept.get(NESTED), dict) and KEY in text:
        kept[NESTED] = {key: value for key, value in text.items() if key != KEY}
    return kept
