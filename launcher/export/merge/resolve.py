"""Maps the names in an adapter's file to the tensors of the base that they edit.

The grammar of the names is that of PEFT 0.21's files (utils/save_and_load.py,
get_peft_model_state_dict).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from launcher.errors import UserError
from launcher.export.merge import per_expert, target_parameters
from launcher.export.merge.edits import (
    BiasAddend,
    Edit,
    MatrixLora,
    Replacement,
    TrainedTokens,
    same_values,
)
from launcher.export.merge.factors import Factors, collect_factors, unmatched_error
from launcher.export.merge.lora import Delta
from launcher.export.merge.ties import EmbeddingPair
from launcher.io.adapter import PREFIX, Adapter
from launcher.io.adapter_config import MERGE_WITH_PEFT, check_mergeable, is_saved
from launcher.io.tensor import Tensor

LORA = re.compile(
    r"(.+)\.lora_(?:(embedding_)?([AB])(\.weight|\.bias)?|(magnitude_vector)(?:\.weight)?)"
)
CONV1D_MODULES = {  # model type → modules of transformers' Conv1D, whose weight is [in, out]
    "gpt2": ("c_attn", "q_attn", "c_proj", "c_fc"),
    "openai-gpt": ("c_attn", "c_proj", "c_fc"),
    "imagegpt": ("c_attn", "q_attn", "c_proj", "c_fc"),
    "decision_transformer": ("c_attn", "q_attn", "c_proj", "c_fc"),
}

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class ParsedAdapter:
    lora: dict[str, Factors] = field(default_factory=dict)  # by module, including .base_layer
    plain: dict[str, Tensor] = field(default_factory=dict)  # by name in the file without the prefix
    tokens: dict[str, Tensor] = field(default_factory=dict)  # by module


def resolve(
    adapter: Adapter,
    base: dict[str, Tensor],
    config: dict[str, Any],
    pair: EmbeddingPair | None,
) -> dict[str, list[Edit]]:
    """The edits by the base's names. Every tensor of the adapter is used in exactly one edit.

    Raises UserError for an adapter that cannot be merged, or that belongs to another model.
    """
    check_mergeable(adapter)
    parsed = _parse(adapter)
    edits: dict[str, list[Edit]] = {}
    unmatched: list[str] = []
    shapes = {name: tensor.shape for name, tensor in base.items()}
    if pair is not None and pair.tied:
        shapes.setdefault(pair.head, shapes[pair.embedding])
    for key, tensor in parsed.plain.items():
        name, replacement = _replacement(adapter, key, tensor, pair)
        if not _fits(tensor.shape, shapes.get(name), name, pair):
            unmatched.append(f"{key} {list(tensor.shape)}")
            continue
        shapes[name] = tensor.shape
        edits.setdefault(name, []).append(replacement)
    modules = dict(parsed.lora)
    named_edits = [
        *per_expert.take_edits(adapter, modules, shapes, config),
        *target_parameters.take_edits(adapter, modules, shapes, config),
        *_take_matrix_edits(adapter, modules, shapes, config),
        *_token_edits(adapter, parsed.tokens, shapes, pair),
    ]
    for name, edit in named_edits:
        edits.setdefault(name, []).append(edit)
    unmatched += [key for factors in modules.values() for key in factors.keys]
    if unmatched:
        raise unmatched_error(adapter, unmatched)
    return edits


def _parse(adapter: Adapter) -> ParsedAdapter:
    parsed = ParsedAdapter()
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in adapter.tensors.items():
        if not key.startswith(PREFIX):
            raise unmatched_error(adapter, [key])
        name = key.removeprefix(PREFIX)
        if match := LORA.fullmatch(name):
            part = match[5] or f"{match[2] or ''}{match[3]}{'.bias' if match[4] == '.bias' else ''}"
            groups.setdefault(match[1], {})[part] = tensor.renamed(key)
        elif name.endswith(".token_adapter.trainable_tokens_delta"):
            parsed.tokens[name.removesuffix(".token_adapter.trainable_tokens_delta")] = tensor
        else:
            parsed.plain[name] = tensor
    _drop_copies(parsed.plain)
    for module, parts in groups.items():
        parsed.lora[module] = collect_factors(adapter, module, parts)
    return parsed


def _replacement(
    adapter: Adapter, key: str, tensor: Tensor, pair: EmbeddingPair | None
) -> tuple[str, Replacement]:
    name = re.sub(r"(\.token_adapter)?\.base_layer(?=\.\w+$)", "", key)
    names = [name]
    if adapter.config.get("ensure_weight_tying") and pair is not None and name == pair.head:
        names.append(pair.embedding)  # the head is then a copy of the saved embedding
    saved = any(is_saved(adapter.config, path.rpartition(".")[0]) for path in names)
    return name, Replacement(tensor, shared=not saved)


def _drop_copies(plain: dict[str, Tensor]) -> None:
    """With save_embedding_layers, PEFT also saves the weights of a trained module and of its
    original."""
    for key in list(plain):
        name, inserted = re.subn(r"\.(modules_to_save|original_module)(?=\.\w+$)", "", key)
        copied = inserted and name in plain
        if copied and (".original_module." in key or same_values(plain[key], plain[name])):
            del plain[key]


def _fits(
    shape: tuple[int, ...],
    base_shape: tuple[int, ...] | None,
    name: str,
    pair: EmbeddingPair | None,
) -> bool:
    """Whether the shapes are equal. The number of tokens may differ."""
    if base_shape is None or pair is None or name not in (pair.embedding, pair.head):
        return shape == base_shape
    return len(shape) == 2 and shape[1] == base_shape[1]


def _take_matrix_edits(
    adapter: Adapter, modules: dict[str, Factors], shapes: Shapes, config: dict[str, Any]
) -> Iterator[tuple[str, Edit]]:
    """(weight, edit) for LoRA on linear layers and embeddings, which are removed from `modules`."""
    for module in list(modules):
        weight = shapes.get(f"{module}.weight")
        if weight is None:
            continue
        if len(weight) != 2:
            raise UserError(
                f"{adapter.origin}: {module} is a convolution or stack {list(weight)}, and LoRA is "
                f"merged only into matrices; {MERGE_WITH_PEFT}"
            )
        factors = modules.pop(module)
        transposed = factors.embedding or _is_transposed(module, weight, factors, config)
        outputs, inputs = weight[::-1] if transposed else weight
        _, scale = factors.checked_rank_and_scale(adapter, module, inputs, outputs, weight)
        mica = str(adapter.config.get("init_lora_weights")).lower() == "mica"
        dora = factors.magnitude is not None
        delta = Delta(factors.a, factors.b, scale, factors.magnitude)
        delta_first = (factors.embedding and not dora) or mica or _is_router(module, shapes)
        yield f"{module}.weight", MatrixLora(delta, transposed, delta_first)
        if factors.bias is not None:
            yield _bias_edit(adapter, module, factors.bias, scale, shapes)


def _bias_edit(
    adapter: Adapter, module: str, bias: Tensor, scale: float, shapes: Shapes
) -> tuple[str, BiasAddend]:
    name = f"{module}.bias"
    if shapes.get(name) != bias.shape:
        raise UserError(
            f"{adapter.origin}: {module} was trained with lora_bias, but the base has no bias of "
            f"shape {list(bias.shape)} to add it to; it can only be served as an adapter"
        )
    return name, BiasAddend(bias, scale)


def _is_transposed(
    module: str, weight: tuple[int, ...], factors: Factors, config: dict[str, Any]
) -> bool:
    """Whether the weight is [in, out]. For a square weight the module's name decides: PEFT uses the
    module's class and ignores fan_in_fan_out."""
    if weight[0] != weight[1]:
        return (factors.a.shape[1], factors.b.shape[0]) == weight
    model_type = str(config.get("model_type"))
    return module.rpartition(".")[2] in CONV1D_MODULES.get(model_type, ())


def _is_router(module: str, shapes: Shapes) -> bool:
    """Whether the module is the gate of fused experts. It is not a linear layer, so PEFT targets
    its parameter."""
    parent, _, leaf = module.rpartition(".")
    return leaf == "gate" and f"{parent}.experts.down_proj" in shapes


def _token_edits(
    adapter: Adapter, tokens: dict[str, Tensor], shapes: Shapes, pair: EmbeddingPair | None
) -> Iterator[tuple[str, Edit]]:
    """(weight, edit) for trainable tokens: the rows of an embedding or head at the indices that the
    config lists."""
    for module, values in tokens.items():
        name = f"{module}.weight"
        indices = _token_indices(adapter, module, pair)
        shape = shapes.get(name)
        if shape is None or shape[1:] != values.shape[1:] or len(indices) != values.shape[0]:
            raise UserError(
                f"{adapter.origin}: {module} has {values.shape[0]} trained token(s) of "
                f"{values.shape[1:]}, which fit neither trainable_token_indices ({len(indices)}) "
                f"nor the base's {shape}; does the adapter belong to another model?"
            )
        if wrong := [index for index in indices if not 0 <= index < shape[0]]:
            raise UserError(
                f"{adapter.origin}: trainable_token_indices has {wrong[0]}, but {name} has rows 0 "
                f"to {shape[0] - 1}; does the adapter belong to another model?"
            )
        yield name, TrainedTokens(values, indices)


def _token_indices(adapter: Adapter, module: str, pair: EmbeddingPair | None) -> tuple[int, ...]:
    """A list in the config is for the input embedding and the tied head. The keys of a dict match
    the end of the module's path."""
    setting = adapter.config.get("trainable_token_indices") or ()
    if isinstance(setting, dict):
        matching = [value for key, value in setting.items() if module.endswith(key)]
        if not matching and pair is not None and f"{module}.weight" == pair.head:
            embedding = pair.embedding.removesuffix(".weight")
            matching = [value for key, value in setting.items() if embedding.endswith(key)]
        setting = matching[0] if matching else ()
    return tuple(setting)
