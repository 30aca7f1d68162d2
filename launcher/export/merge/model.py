"""A model with adapters merged: what every tensor of the output is, before any is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from launcher.errors import UserError
from launcher.export.merge.adapter import Adapter
from launcher.export.merge.edits import Edit, Replace, apply, check_finite, same_values
from launcher.export.merge.resolve import resolve
from launcher.export.merge.ties import Ends, changed, find_ends, is_tied, setting, tie
from launcher.export.tensor import Tensor

LOOKED_THROUGH = 64 << 20  # bytes; larger adapters are checked for NaN while they are merged


@dataclass(frozen=True)
class Merged:
    tensors: dict[str, Tensor]  # in the base's order; those untouched are the base's own objects
    actions: dict[str, str]  # name → "copied", "merged (LoRA)", "replaced", …
    config: dict[str, Any]  # entries of config.json that change
    notes: tuple[str, ...]  # sentences for the person


def merge(
    base: dict[str, Tensor],
    config: dict[str, Any],
    adapters: Sequence[Adapter],
    tied: Literal["auto", "untie", "error"] = "auto",
    device: str = "cpu",
) -> Merged:
    """The base with the adapters' deltas added, in the order given, and one rounding.

    `base` is by transformers' names in memory, `config` is its config.json. Where embedding and
    head are one tensor and the adapters make them differ, "auto" writes both and unties them in
    the config, and "error" refuses; "untie" unties them even if they are the same. `device` is
    where A and B are multiplied: on a GPU the last bit may be another. Raises UserError for
    adapters that do not fit or cannot be merged; nothing is computed before that.
    """
    ends = find_ends(base, config)
    edits: dict[str, list[Edit]] = {}
    for adapter in adapters:
        for name, more in resolve(adapter, base, config, ends).items():
            edits[name] = _together(edits.get(name, []), more)
        _look_through(adapter)
    untied = False
    if ends is not None and ends.tied:
        untied = _tie(ends, edits, base, adapters, tied)
    elif ends is None:
        _refuse_unknown_ties(edits, base, config)
    merged = dict(base)
    if untied and ends is not None and ends.head not in base:
        merged[ends.head] = base[ends.embedding].called(ends.head)
    actions = dict.fromkeys(merged, "copied")
    for name, own in edits.items():
        if own:
            merged[name], actions[name] = apply(merged[name], own, device)
    changes, notes = _changes(ends, base, merged, config, untied)
    return Merged(merged, actions, changes, notes)


def _together(one: list[Edit], more: list[Edit]) -> list[Edit]:
    """The edits of a tensor by several adapters; a copy that both saved counts once."""
    copies = [edit for edit in one if isinstance(edit, Replace)]
    return one + [
        edit
        for edit in more
        if not (
            isinstance(edit, Replace)
            and any(same_values(edit.values, copy.values) for copy in copies)
        )
    ]


def _look_through(adapter: Adapter) -> None:
    if sum(tensor.nbytes for tensor in adapter.tensors.values()) < LOOKED_THROUGH:
        for tensor in adapter.tensors.values():
            check_finite(tensor, adapter.origin)


def _tie(
    ends: Ends,
    edits: dict[str, list[Edit]],
    base: dict[str, Tensor],
    adapters: Sequence[Adapter],
    tied: str,
) -> bool:
    """Settle a tied embedding's and head's edits in `edits`; whether they are now two tensors."""
    ensured = any(adapter.config.get("ensure_weight_tying") for adapter in adapters)
    inputs, outputs, same = tie(ends, edits, ensured)
    if not same and tied == "error":
        origins = ", ".join(str(adapter.origin) for adapter in adapters)
        raise UserError(
            f"{origins}: after merging, {ends.embedding} and {ends.head} differ, but config.json "
            "ties them; allow them to be untied with --tied untie"
        )
    untied = not same or tied == "untie"
    edits[ends.embedding] = inputs
    edits[ends.head] = outputs if untied or ends.head in base else []
    return untied


def _refuse_unknown_ties(
    edits: dict[str, list[Edit]], base: dict[str, Tensor], config: dict[str, Any]
) -> None:
    """A tied vocabulary that is edited, but whose sides are not known by their names."""
    vocabulary = setting(config, "vocab_size")
    touched = [name for name in edits if base[name].shape[:1] == (vocabulary,)]
    if touched and is_tied(config, has_head=False):
        raise UserError(
            f"the adapter changes {touched[0]}, and config.json ties embeddings that this tool "
            "does not know by their names; merge it with PEFT and consolidate the result"
        )


def _changes(
    ends: Ends | None,
    base: dict[str, Tensor],
    merged: dict[str, Tensor],
    config: dict[str, Any],
    untied: bool,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The entries of config.json that change, and why. UserError when the vocabularies differ."""
    if ends is None:
        return {}, ()
    values: dict[str, Any] = {}
    notes = []
    rows = merged[ends.embedding].shape[0]
    head = merged.get(ends.head)
    if head is not None and head.shape[0] != rows:
        raise UserError(
            f"after merging, {ends.embedding} has {rows} rows and {ends.head} {head.shape[0]}; "
            "save the adapter with save_embedding_layers=True, so that it holds both"
        )
    if rows != base[ends.embedding].shape[0]:
        values["vocab_size"] = rows
        notes.append(f"the vocabulary has {rows} rows, as in the adapter, not the base's")
    if untied:
        values["tie_word_embeddings"] = False
        notes.append(f"{ends.embedding} and {ends.head} are two tensors now, and no longer tied")
    return changed(config, **values) if values else {}, tuple(notes)
