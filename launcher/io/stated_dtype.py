"""The dtype that a config.json states for the weights."""

from __future__ import annotations

from typing import Any

import torch

from launcher.folders.vocabulary import config_value


def stated_dtype(config: dict[str, Any]) -> torch.dtype | None:
    """The dtype of the weights by the contents of a config.json, or by its text_config; None if
    neither names one."""
    name = config_value(config, "dtype") or config_value(config, "torch_dtype")
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    return dtype if isinstance(dtype, torch.dtype) else None
