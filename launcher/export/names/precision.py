"""Which parameters a class keeps in fp32 whatever the dtype of the model: the biases that correct a
router, for example."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def kept_in_fp32(model: Any, names: Iterable[str], dtype: torch.dtype) -> frozenset[str]:
    """Those of the names in memory that `from_pretrained` keeps in fp32 if it loads `model` in
    `dtype`."""
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)
    if not plan:
        return frozenset()
    pattern, *_ = build_glob_alternation(list(plan))
    return frozenset(name for name in names if pattern.search(name))
