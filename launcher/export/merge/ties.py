"""Input embedding and output head that are one tensor in the base, and what becomes of the tie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launcher.errors import UserError
from launcher.export.merge.edits import Edit, Low, Replace, Tokens, same_values
from launcher.export.tensor import Tensor

EMBEDDINGS = {
    "embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "tokens_embed",
}  # fmt: skip
HEAD = "lm_head.weight"  # transformers' name in memory, whatever the folder calls it
HEADED = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "DoubleHeadsModel")


@dataclass(frozen=True)
class Ends:
    """Names of the input embedding and the output head; `tied`: they are one tensor."""

    embedding: str
    head: str
    tied: bool


def is_tied(config: dict[str, Any], has_head: bool) -> bool:
    """Whether the model has a head that is its embedding; by default when the folder lacks one."""
    flag = setting(config, "tie_word_embeddings")
    headed = any(each.endswith(HEADED) for each in config.get("architectures") or ["ForCausalLM"])
    return headed and (not has_head if flag is None else bool(flag))


def find_ends(base: dict[str, Tensor], config: dict[str, Any]) -> Ends | None:
    """None when the embedding cannot be told from its name and the vocabulary's size."""
    vocabulary = setting(config, "vocab_size")
    names = [
        name
        for name, tensor in base.items()
        if name.endswith(".weight") and name.split(".")[-2] in EMBEDDINGS and len(tensor.shape) == 2
    ]
    exact = [name for name in names if base[name].shape[0] == vocabulary]
    names = exact or names
    if len(names) != 1:
        return None
    return Ends(names[0], HEAD, is_tied(config, HEAD in base))


def tie(
    ends: Ends, edits: dict[str, list[Edit]], ensured: bool
) -> tuple[list[Edit], list[Edit], bool]:
    """The edits of the embedding and of the head of a tied model, and whether they are the same.

    What an adapter wrote into the shared parameter is on both sides, and so are trainable tokens
    of the embedding (peft/utils/other.py, set_additional_trainable_modules).
    """
    inputs, outputs = edits.get(ends.embedding, []), edits.get(ends.head, [])
    shared = _once([e for e in (*inputs, *outputs) if isinstance(e, Replace) and e.shared], ends)
    inputs = [*shared, *(e for e in inputs if not (isinstance(e, Replace) and e.shared))]
    outputs = [*shared, *(e for e in outputs if not (isinstance(e, Replace) and e.shared))]
    if not any(isinstance(edit, Tokens) for edit in outputs):
        outputs += [edit for edit in inputs if isinstance(edit, Tokens)]
    if ensured and not any(isinstance(edit, Replace) and not edit.shared for edit in outputs):
        outputs += [edit for edit in inputs if isinstance(edit, Replace) and not edit.shared]
    same = len(inputs) == len(outputs) and all(
        _same(one, other) for one, other in zip(inputs, outputs, strict=True)
    )
    return inputs, inputs if same else outputs, same


def changed(config: dict[str, Any], **values: Any) -> dict[str, Any]:
    """The entries of config.json that say so, at the top and wherever a text_config says it too."""
    changes: dict[str, Any] = {}
    text = config.get("text_config")
    if isinstance(text, dict):
        changes["text_config"] = {**text, **values}
    for key, value in values.items():
        if not isinstance(text, dict) or key in config or key == "tie_word_embeddings":
            changes[key] = value
    return changes


def setting(config: dict[str, Any], key: str) -> Any:
    """Of the config, or of its text_config."""
    text = config.get("text_config")
    if config.get(key) is None and isinstance(text, dict):
        return text.get(key)
    return config.get(key)


def _once(shared: list[Replace], ends: Ends) -> list[Replace]:
    for other in shared[1:]:
        if not same_values(shared[0].values, other.values):
            raise UserError(
                f"the adapter holds different values for {ends.embedding} and {ends.head}, which "
                "config.json ties; name them in modules_to_save, or untie the base"
            )
    return shared[:1]


def _same(one: Edit, other: Edit) -> bool:
    if isinstance(one, Replace) and isinstance(other, Replace):
        return same_values(one.values, other.values)
    if isinstance(one, Tokens) and isinstance(other, Tokens):
        return one.indices == other.indices and same_values(one.values, other.values)
    if isinstance(one, Low) and isinstance(other, Low):  # the head's factors are the embedding's
        return (
            one.turned != other.turned
            and one.delta.magnitude is other.delta.magnitude is None
            and one.delta.scale == other.delta.scale
            and same_values(one.delta.a, other.delta.b, transposed=True)
            and same_values(one.delta.b, other.delta.a, transposed=True)
        )
    return one is other
