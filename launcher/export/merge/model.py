"""Merges adapters into a model: decides what each output tensor is, before any is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from launcher.errors import UserError
from launcher.export.merge.edits import Edit, Replacement, apply_edits, check_finite, same_values
from launcher.export.merge.resolve import resolve
from launcher.export.merge.ties import (
    EmbeddingPair,
    find_embedding_pair,
    is_tied,
    tied_edits,
)
from launcher.folders.vocabulary import config_changes, config_value
from launcher.io.adapter import Adapter
from launcher.io.tensor import Tensor

FINITE_CHECK_BYTES = 64 << 20  # larger adapters are checked for NaN only while they are merged


@dataclass(frozen=True)
class Merged:
    tensors: dict[str, Tensor]  # in the base's order; unchanged ones are the base's own objects
    actions: dict[str, str]  # name → "copied", "merged (LoRA)", "replaced", …
    config: dict[str, Any]  # the entries of config.json that change
    notes: tuple[str, ...]  # messages for the user


def merge(
    base: dict[str, Tensor],
    config: dict[str, Any],
    adapters: Sequence[Adapter],
    tied: Literal["auto", "untie", "error"] = "auto",
    device: str = "cpu",
) -> Merged:
    """The base with the adapters' deltas added, in the given order and with one rounding.

    Args:
        base: Tensors by their names in transformers' model in memory.
        config: The base's config.json.
        tied: What happens if embedding and head are one tensor and the adapters make them differ:
            "auto" writes both and unties them in the config, "error" refuses. "untie" unties them
            even if they are equal.
        device: Where A and B are multiplied. On a GPU the last bit can differ.

    Raises UserError for adapters that do not fit or cannot be merged, before anything is computed.
    """
    pair = find_embedding_pair(base, config)
    edits: dict[str, list[Edit]] = {}
    for adapter in adapters:
        for name, adapter_edits in resolve(adapter, base, config, pair).items():
            edits[name] = _combine(edits.get(name, []), adapter_edits)
        _check_small_adapter(adapter)
    untied = False
    if pair is not None and pair.tied:
        untied = _resolve_tie(pair, edits, base, adapters, tied)
    elif pair is None:
        _refuse_unknown_ties(edits, base, config)
    merged = dict(base)
    if untied and pair is not None and pair.head not in base:
        merged[pair.head] = base[pair.embedding].renamed(pair.head)
    actions = dict.fromkeys(merged, "copied")
    for name, tensor_edits in edits.items():
        if tensor_edits:
            merged[name], actions[name] = apply_edits(merged[name], tensor_edits, device)
    changes, notes = _config_changes(pair, base, merged, config, untied)
    return Merged(merged, actions, changes, notes)


def _combine(edits: list[Edit], new_edits: list[Edit]) -> list[Edit]:
    """The edits of a tensor by several adapters. An equal copy that two adapters saved counts
    once."""
    copies = [edit for edit in edits if isinstance(edit, Replacement)]
    return edits + [
        edit
        for edit in new_edits
        if not (
            isinstance(edit, Replacement)
            and any(same_values(edit.values, copy.values) for copy in copies)
        )
    ]


def _check_small_adapter(adapter: Adapter) -> None:
    """Raises UserError if an adapter below FINITE_CHECK_BYTES contains a NaN or an infinity."""
    if sum(tensor.nbytes for tensor in adapter.tensors.values()) < FINITE_CHECK_BYTES:
        for tensor in adapter.tensors.values():
            check_finite(tensor, adapter.origin)


def _resolve_tie(
    pair: EmbeddingPair,
    edits: dict[str, list[Edit]],
    base: dict[str, Tensor],
    adapters: Sequence[Adapter],
    tied: str,
) -> bool:
    """Set the edits of a tied embedding and head in `edits`. Returns whether they become two
    tensors."""
    ensured = any(adapter.config.get("ensure_weight_tying") for adapter in adapters)
    inputs, outputs, same = tied_edits(pair, edits, ensured)
    if not same and tied == "error":
        origins = ", ".join(str(adapter.origin) for adapter in adapters)
        raise UserError(
            f"{origins}: after merging, {pair.embedding} and {pair.head} differ, but config.json "
            "ties them; allow them to be untied with --tied untie"
        )
    untied = not same or tied == "untie"
    edits[pair.embedding] = inputs
    edits[pair.head] = outputs if untied or pair.head in base else []
    return untied


def _refuse_unknown_ties(
    edits: dict[str, list[Edit]], base: dict[str, Tensor], config: dict[str, Any]
) -> None:
    """Raises UserError if a tied embedding is edited whose name is not known."""
    vocabulary = config_value(config, "vocab_size")
    edited = [name for name in edits if base[name].shape[:1] == (vocabulary,)]
    if edited and is_tied(config, has_head=False):
        raise UserError(
            f"the adapter changes {edited[0]}, and config.json ties embeddings that this tool "
            "does not know by their names; merge it with PEFT and consolidate the result"
        )


def _config_changes(
    pair: EmbeddingPair | None,
    base: dict[str, Tensor],
    merged: dict[str, Tensor],
    config: dict[str, Any],
    untied: bool,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(the entries of config.json that change, notes with the reasons). Raises UserError if
    embedding and head have different numbers of rows."""
    if pair is None:
        return {}, ()
    values: dict[str, Any] = {}
    notes = []
    rows = merged[pair.embedding].shape[0]
    head = merged.get(pair.head)
    resized = any(merged[name].shape != tensor.shape for name, tensor in base.items())
    if head is not None and head.shape[0] != rows and resized:
        raise UserError(
            f"after merging, {pair.embedding} has {rows} rows and {pair.head} {head.shape[0]}; "
            "save the adapter with save_embedding_layers=True, so that it contains both"
        )
    if rows != base[pair.embedding].shape[0]:
        values["vocab_size"] = rows
        notes.append(f"the vocabulary has {rows} rows, as in the adapter, not as in the base")
    if untied:
        values["tie_word_embeddings"] = False
        notes.append(f"{pair.embedding} and {pair.head} are now two tensors and no longer tied")
    return config_changes(config, **values) if values else {}, tuple(notes)
