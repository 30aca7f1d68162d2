"""Test what training takes for granted about a model: causality, and separate packed documents.

Both compare logits of the real model, so no architecture needs to be known by name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from launcher.data.collate import MicroBatch, collate
from launcher.errors import UserError, first_sentence
from launcher.model.attention import is_ours
from launcher.model.packed_masks import give_masks
from launcher.model.peft import PeftModel
from launcher.training.state import TrainState

DOCUMENT_LENGTH = 8  # tokens
# Of the largest logit. The last bits of a row's result may depend on the other rows, because of
# the kernel, and in 16 bits also on the shape.
TOLERANCES = {torch.float32: 1e-4}
HALF_TOLERANCE, HALF_SHAPE_TOLERANCE = 0.01, 0.05


def check_model(state: TrainState, packed: bool, dtype: torch.dtype) -> None:
    """All checks of a model that is ready to train, where they are needed. Collective.

    Attention by a function of launcher.model.attention is causal. `dtype`: of the computation.
    """
    model, device = state.strategy.model, state.rank_info.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if not is_ours(state.model):
            check_causality(model, device, state.vocabulary_size, dtype)
        if packed:
            bare = state.model
            bare = bare.get_base_model() if isinstance(bare, PeftModel) else bare
            separate_attention(model, bare, device, state.vocabulary_size, dtype)


def separate_attention(
    model: nn.Module, bare: nn.Module, device: torch.device, vocabulary: int, dtype: torch.dtype
) -> None:
    """`check_document_masking` of `model`; if it fails, give the model masks, and check again.

    `bare`: the model inside, without the wrappers of strategy and method.
    """
    try:
        check_document_masking(model, device, vocabulary, dtype)
    except UserError as error:
        take_back = give_masks(bare, dtype)
        try:
            check_document_masking(model, device, vocabulary, dtype)
        except UserError:
            take_back()
            raise error from None


@torch.no_grad()
def check_causality(
    model: nn.Module, device: torch.device, vocabulary: int, dtype: torch.dtype
) -> None:
    """Change the second half of a row, and compare the logits of the first. `dtype`: of the
    computation.

    Every rank does the same. Raises UserError if the logits change (the model reads both sides, so
    it would copy its targets), and if it does not compute logits from token ids alone, or only of
    rows of one length.
    """
    first, other = _documents(vocabulary)[:2]
    name = _name_of(model)
    model.eval()
    incapable = f"{name} does not compute logits from token ids alone"
    before, after = (
        _text_logits(model, device, [*first, *second], incapable) for second in (first, other)
    )
    model.train()
    fixed = f"{name} takes no row of {2 * DOCUMENT_LENGTH} tokens in training, only of some lengths"
    _text_logits(model, device, [*first, *other], fixed)
    before, after = before[:DOCUMENT_LENGTH], after[:DOCUMENT_LENGTH]
    if _differ(before, after, TOLERANCES.get(dtype, HALF_TOLERANCE)):
        raise UserError(
            f"{name} is not causal: its logits depend on the tokens that they should predict → a "
            "causal language model, or is_decoder=true or use_bidirectional_attention=false in "
            "config.json if it has that key"
        )


@torch.no_grad()
def check_document_masking(
    model: nn.Module, device: torch.device, vocabulary: int, dtype: torch.dtype
) -> None:
    """Compare the logits of a packed document with those that it has behind another first document,
    and alone without packing. `dtype`: of the computation.

    Every rank does the same. Raises UserError if they differ (with recurrent layers that carry
    their state on, an attention that ignores document boundaries, or positions that go on), and if
    transformers rejects packed documents.
    """
    first, other, second = _documents(vocabulary)
    model.eval()
    try:
        before, after, alone = (
            _logits(model, device, documents, packed)[-DOCUMENT_LENGTH:]
            for documents, packed in (
                ([first, second], True),
                ([other, second], True),
                ([second], False),
            )
        )
    except Exception as error:  # each class refuses in its own way
        raise UserError(
            f"data.packing=true: {_name_of(model)} does not compute a sequence of several documents"
            f" ({type(error).__name__}: {first_sentence(error)}) → data.packing=false"
        ) from error
    model.train()
    same_shape = TOLERANCES.get(dtype, HALF_TOLERANCE)
    other_shape = TOLERANCES.get(dtype, HALF_SHAPE_TOLERANCE)
    if _differ(before, after, same_shape) or _differ(before, alone, other_shape):
        raise UserError(
            f"data.packing=true: {_name_of(model)} does not keep the documents of a packed "
            "sequence separate → data.packing=false"
        )


def _name_of(model: Any) -> str:
    """The class of the model, without those of the strategy and of PEFT."""
    bare = getattr(model, "module", model)
    kind = type(bare.get_base_model() if isinstance(bare, PeftModel) else bare)
    if issubclass(kind, FSDPModule):
        kind = kind.__bases__[-1]
    return kind.__name__


def _documents(vocabulary: int) -> list[list[int]]:
    """Three documents without a common token, if the vocabulary is large enough."""
    middle = vocabulary // 2
    return [
        list(range(DOCUMENT_LENGTH)),
        list(range(DOCUMENT_LENGTH, 2 * DOCUMENT_LENGTH)),
        list(range(middle, middle + DOCUMENT_LENGTH)),
    ]


def _differ(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    return bool((one - other).abs().max() > tolerance * one.abs().max())


def _text_logits(model: nn.Module, device: torch.device, row: list[int], refusal: str) -> Any:
    """The logits of a row. Raises UserError with `refusal` if the model raises an exception."""
    try:
        return _logits(model, device, [row], packed=False)
    except Exception as error:  # each class refuses in its own way
        raise UserError(
            f"{refusal} ({type(error).__name__}: {first_sentence(error)}) → another causal "
            "language model"
        ) from error


def _logits(
    model: nn.Module, device: torch.device, documents: list[list[int]], packed: bool
) -> torch.Tensor:
    rows = [(np.asarray(ids, np.int32), np.ones(len(ids), np.bool_)) for ids in documents]
    batch: MicroBatch = collate([rows], 1, 0, packed).to(device)
    logits: torch.Tensor = model(**batch.inputs()).logits[0]
    return logits.float()
