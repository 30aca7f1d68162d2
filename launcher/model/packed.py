"""Whether a model keeps packed documents apart, seen by trying."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from launcher.data.batch import collate
from launcher.errors import UserError

LENGTH = 8  # tokens of each document of the trial


@torch.no_grad()
def check_apart(model: nn.Module, device: torch.device, vocabulary: int) -> None:
    """Change the first of two packed documents and look at the logits of the second.

    Every rank does so alike. Raises UserError where they change (recurrent layers, say, or an
    attention that takes no heed of documents), or where transformers knows that they would.
    """
    model.eval()
    second = range(vocabulary // 2, vocabulary // 2 + LENGTH)
    try:
        before, after = (
            _logits(model, device, [[*first], [*second]])[LENGTH:]
            for first in (range(LENGTH), range(LENGTH, 2 * LENGTH))
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"data.packing=true: {error} → data.packing=false") from error
    model.train()
    # A row's result may differ in its last bits with its neighbours, by the kernel's choice.
    if (before - after).abs().max() > 0.01 * before.abs().max():
        raise UserError(
            f"data.packing=true: {type(model).__name__} lets the documents of a packed sequence "
            "see each other → data.packing=false"
        )


def _logits(model: nn.Module, device: torch.device, documents: list[list[int]]) -> torch.Tensor:
    rows: list[Any] = [
        (np.asarray(each, np.int32), np.ones(len(each), np.bool_)) for each in documents
    ]
    batch = collate([rows], 1, 0, packed=True).to(device)
    logits: torch.Tensor = model(**batch.inputs()).logits[0]
    return logits
