"""Test whether a model keeps packed documents separate."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from launcher.data.collate import collate
from launcher.errors import UserError

DOCUMENT_LENGTH = 8  # tokens


@torch.no_grad()
def check_document_masking(model: nn.Module, device: torch.device, vocabulary: int) -> None:
    """Change the first of two packed documents, and compare the logits of the second.

    Every rank does the same. Raises UserError if the logits change (with recurrent layers, or an
    attention that ignores document boundaries), and if transformers rejects packed documents.
    """
    model.eval()
    second = range(vocabulary // 2, vocabulary // 2 + DOCUMENT_LENGTH)
    try:
        before, after = (
            _logits(model, device, [[*first], [*second]])[DOCUMENT_LENGTH:]
            for first in (range(DOCUMENT_LENGTH), range(DOCUMENT_LENGTH, 2 * DOCUMENT_LENGTH))
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"data.packing=true: {error} → data.packing=false") from error
    model.train()
    # The last bits of a row's result may depend on the other rows, because of the kernel.
    if (before - after).abs().max() > 0.01 * before.abs().max():
        raise UserError(
            f"data.packing=true: {type(model).__name__} does not keep the documents of a packed "
            "sequence separate → data.packing=false"
        )


def _logits(model: nn.Module, device: torch.device, documents: list[list[int]]) -> torch.Tensor:
    rows = [(np.asarray(ids, np.int32), np.ones(len(ids), np.bool_)) for ids in documents]
    batch = collate([rows], 1, 0, packed=True).to(device)
    logits: torch.Tensor = model(**batch.inputs()).logits[0]
    return logits
