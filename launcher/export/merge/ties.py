"""Tied embeddings: whether input embedding and output head are one tensor, and whether edits untie
them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launcher.errors import UserError
from launcher.export.merge.edits import Edit, MatrixLora, Replacement, TrainedTokens, same_values
from launcher.folders.vocabulary import EMBEDDING_MODULES, config_value
from launcher.folders.vocabulary import config_changes as config_changes
from launcher.io.tensor import Tensor

HEAD = "lm_head.weight"  # the end of transformers' name in memory, for every name on disk
CLASSES_WITH_HEAD = (
    "ForCausalLM",
    "LMHeadModel",
    "ForConditionalGeneration",
    "DoubleHeadsModel",
)


@dataclass(frozen=True)
class EmbeddingPair:
    """The names of the input embedding and the output head. `tied`: they are one tensor."""

    embedding: str
    head: str
    tied: bool


def is_tied(config: dict[str, Any], has_head: bool) -> bool:
    """Whether the model's head is its embedding. If the config does not specify it, they are tied
    unless the folder contains a head (`has_head`)."""
    flag = config_value(config, "tie_word_embeddings")
    classes = config.get("architectures") or ["ForCausalLM"]
    class_has_head = any(name.endswith(CLASSES_WITH_HEAD) for name in classes)
    return class_has_head and (not has_head if flag is None else bool(flag))


def find_embedding_pair(base: dict[str, Tensor], config: dict[str, Any]) -> EmbeddingPair | None:
    """The pair, or None if names and vocabulary size do not identify the embedding."""
    vocabulary = config_value(config, "vocab_size")
    names = [
        name
        for name, tensor in base.items()
        if name.endswith(".weight")
        and name.split(".")[-2] in EMBEDDING_MODULES
        and len(tensor.shape) == 2
    ]
    of_size = [name for name in names if base[name].shape[0] == vocabulary]
    names = of_size or names
    if len(names) != 1:
        return None
    head = next((name for name in base if name.endswith(f".{HEAD}")), HEAD)
    return EmbeddingPair(names[0], head, is_tied(config, head in base))


def tied_edits(
    pair: EmbeddingPair, edits: dict[str, list[Edit]], ensured: bool
) -> tuple[list[Edit], list[Edit], bool]:
    """(edits of the embedding, edits of the head, whether they are the same) for a tied model.

    Values that an adapter wrote into the shared parameter apply to both, and so do trainable tokens
    of the embedding (peft/utils/other.py, set_additional_trainable_modules). `ensured`: an adapter
    has ensure_weight_tying.
    """
    inputs, outputs = edits.get(pair.embedding, []), edits.get(pair.head, [])
    shared = [e for e in (*inputs, *outputs) if isinstance(e, Replacement) and e.shared]
    shared = _single_replacement(shared, pair)
    inputs, outputs = _with_shared(shared, inputs), _with_shared(shared, outputs)
    if not any(isinstance(edit, TrainedTokens) for edit in outputs):
        outputs += [edit for edit in inputs if isinstance(edit, TrainedTokens)]
    if ensured and not any(isinstance(edit, Replacement) and not edit.shared for edit in outputs):
        outputs += [edit for edit in inputs if isinstance(edit, Replacement) and not edit.shared]
    same = len(inputs) == len(outputs) and all(
        _same_edit(edit, other) for edit, other in zip(inputs, outputs, strict=True)
    )
    return inputs, inputs if same else outputs, same


def _with_shared(shared: list[Replacement], edits: list[Edit]) -> list[Edit]:
    """`edits` with the values of the shared parameter, unless the module has a copy of its own that
    was trained (modules_to_save)."""
    own = [each for each in edits if not (isinstance(each, Replacement) and each.shared)]
    is_copy = any(isinstance(each, Replacement) for each in own)
    return own if is_copy else [*shared, *own]


def _single_replacement(shared: list[Replacement], pair: EmbeddingPair) -> list[Replacement]:
    """The first of the replacements of a shared parameter. Raises UserError if they differ."""
    for other in shared[1:]:
        if not same_values(shared[0].values, other.values):
            raise UserError(
                f"the adapter contains different values for {pair.embedding} and {pair.head}, "
                "which config.json ties; name them in modules_to_save, or untie the base"
            )
    return shared[:1]


def _same_edit(edit: Edit, other: Edit) -> bool:
    if isinstance(edit, Replacement) and isinstance(other, Replacement):
        return same_values(edit.values, other.values)
    if isinstance(edit, TrainedTokens) and isinstance(other, TrainedTokens):
        return edit.indices == other.indices and same_values(edit.values, other.values)
    # The factors of the head are those of the embedding, transposed.
    if isinstance(edit, MatrixLora) and isinstance(other, MatrixLora):
        return (
            edit.transposed != other.transposed
            and edit.delta.magnitude is other.delta.magnitude is None
            and edit.delta.scale == other.delta.scale
            and same_values(edit.delta.a, other.delta.b, transposed=True)
            and same_values(edit.delta.b, other.delta.a, transposed=True)
        )
    return edit is other
