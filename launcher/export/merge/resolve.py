"""From the names in an adapter's file to the tensors of the base that they edit.

The grammar is that of PEFT 0.21's files (utils/save_and_load.py, get_peft_model_state_dict).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from launcher.errors import UserError
from launcher.export.merge import parameters, per_expert
from launcher.export.merge.adapter import PREFIX, Adapter
from launcher.export.merge.edits import Addend, Edit, Low, Replace, Tokens, same_values
from launcher.export.merge.factors import Factors, factors, unmatched
from launcher.export.merge.lora import Delta
from launcher.export.merge.settings import WAY_OUT, check, is_saved
from launcher.export.merge.ties import Ends
from launcher.export.tensor import Tensor

LORA = re.compile(
    r"(.+)\.lora_(?:(embedding_)?([AB])(\.weight|\.bias)?|(magnitude_vector)(?:\.weight)?)"
)
CONV1D_MODELS = {  # transformers' Conv1D keeps its weight [in, out]; the modules that are one
    "gpt2": ("c_attn", "q_attn", "c_proj", "c_fc"),
    "openai-gpt": ("c_attn", "c_proj", "c_fc"),
    "imagegpt": ("c_attn", "q_attn", "c_proj", "c_fc"),
    "decision_transformer": ("c_attn", "q_attn", "c_proj", "c_fc"),
}


@dataclass(frozen=True)
class Parsed:
    lora: dict[str, Factors] = field(default_factory=dict)  # by module, with its .base_layer
    plain: dict[str, Tensor] = field(default_factory=dict)  # by name in the file, less the prefix
    tokens: dict[str, Tensor] = field(default_factory=dict)  # by module


def resolve(
    adapter: Adapter, base: dict[str, Tensor], config: dict[str, Any], ends: Ends | None
) -> dict[str, list[Edit]]:
    """The edits by the base's names. Every tensor of the adapter is used in exactly one.

    Raises UserError for an adapter that cannot be merged, or that is another model's.
    """
    check(adapter)
    parsed = _parse(adapter)
    edits: dict[str, list[Edit]] = {}
    strangers: list[str] = []
    shapes = {name: tensor.shape for name, tensor in base.items()}
    if ends is not None and ends.tied:
        shapes.setdefault(ends.head, shapes[ends.embedding])
    for key, tensor in parsed.plain.items():
        name, replacement = _replace(adapter, key, tensor, ends)
        if not _fits(tensor.shape, shapes.get(name), name, ends):
            strangers.append(f"{key} {list(tensor.shape)}")
            continue
        shapes[name] = tensor.shape
        edits.setdefault(name, []).append(replacement)
    modules = dict(parsed.lora)
    found = [
        *per_expert.edits(adapter, modules, shapes, config),
        *parameters.edits(adapter, modules, shapes, config),
        *_matrices(adapter, modules, shapes, config),
        *_tokens(adapter, parsed.tokens, shapes, ends),
    ]
    for name, edit in found:
        edits.setdefault(name, []).append(edit)
    strangers += [key for each in modules.values() for key in each.keys]
    if strangers:
        raise unmatched(adapter, strangers)
    return edits


def _parse(adapter: Adapter) -> Parsed:
    parsed = Parsed()
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in adapter.tensors.items():
        if not key.startswith(PREFIX):
            raise unmatched(adapter, [key])
        name = key.removeprefix(PREFIX)
        if match := LORA.fullmatch(name):
            part = match[5] or f"{match[2] or ''}{match[3]}{'.bias' if match[4] == '.bias' else ''}"
            groups.setdefault(match[1], {})[part] = tensor.called(key)
        elif name.endswith(".token_adapter.trainable_tokens_delta"):
            parsed.tokens[name.removesuffix(".token_adapter.trainable_tokens_delta")] = tensor
        else:
            parsed.plain[name] = tensor
    _drop_copies(parsed.plain)
    for module, parts in groups.items():
        parsed.lora[module] = factors(adapter, module, parts)
    return parsed


def _replace(adapter: Adapter, key: str, tensor: Tensor, ends: Ends | None) -> tuple[str, Replace]:
    name = re.sub(r"(\.token_adapter)?\.base_layer(?=\.\w+$)", "", key)
    names = [name]
    if adapter.config.get("ensure_weight_tying") and ends is not None and name == ends.head:
        names.append(ends.embedding)  # the head then is a copy of the saved embedding
    saved = any(is_saved(adapter.config, each.rpartition(".")[0]) for each in names)
    return name, Replace(tensor, shared=not saved)


def _drop_copies(plain: dict[str, Tensor]) -> None:
    """With save_embedding_layers, PEFT also saves what a trained module and its original hold."""
    for key in list(plain):
        name, inserted = re.subn(r"\.(modules_to_save|original_module)(?=\.\w+$)", "", key)
        copied = inserted and name in plain
        if copied and (".original_module." in key or same_values(plain[key], plain[name])):
            del plain[key]


def _fits(
    shape: tuple[int, ...], base: tuple[int, ...] | None, name: str, ends: Ends | None
) -> bool:
    """Same shape, but that a vocabulary may have grown or shrunk."""
    if base is None or ends is None or name not in (ends.embedding, ends.head):
        return shape == base
    return len(shape) == 2 and shape[1] == base[1]


def _matrices(
    adapter: Adapter,
    modules: dict[str, Factors],
    shapes: dict[str, tuple[int, ...]],
    config: dict[str, Any],
) -> Iterator[tuple[str, Edit]]:
    """LoRA on linear layers and embeddings; removes what it uses from `modules`."""
    for module in list(modules):
        weight = shapes.get(f"{module}.weight")
        if weight is None:
            continue
        if len(weight) != 2:
            raise UserError(
                f"{adapter.origin}: {module} is a convolution or stack {list(weight)}, and LoRA is "
                f"merged into matrices only; {WAY_OUT}"
            )
        of = modules.pop(module)
        turned = of.embedding or _is_turned(module, weight, of, config)
        outer, inner = weight[::-1] if turned else weight
        _, scale = of.checked(adapter, module, inner, outer, weight)
        mica = str(adapter.config.get("init_lora_weights")).lower() == "mica"
        dora = of.magnitude is not None
        delta = Delta(of.a, of.b, scale, of.magnitude)
        first = (of.embedding and not dora) or mica or _is_router(module, shapes)
        yield f"{module}.weight", Low(delta, turned, first)
        if of.bias is not None:
            yield _bias(adapter, module, of.bias, scale, shapes)


def _bias(
    adapter: Adapter, module: str, bias: Tensor, scale: float, shapes: dict[str, tuple[int, ...]]
) -> tuple[str, Addend]:
    name = f"{module}.bias"
    if shapes.get(name) != bias.shape:
        raise UserError(
            f"{adapter.origin}: {module} was trained with lora_bias, but the base has no bias of "
            f"shape {list(bias.shape)} to add it to; it can only be served as an adapter"
        )
    return name, Addend(bias, scale)


def _is_turned(module: str, weight: tuple[int, ...], of: Factors, config: dict[str, Any]) -> bool:
    """Whether the weight is [in, out]. A square one is told by its name: PEFT goes by the module's
    class, whatever fan_in_fan_out says."""
    if weight[0] != weight[1]:
        return (of.a.shape[1], of.b.shape[0]) == weight
    kind = str(config.get("model_type"))
    return module.rpartition(".")[2] in CONV1D_MODELS.get(kind, ())


def _is_router(module: str, shapes: dict[str, tuple[int, ...]]) -> bool:
    """The gate of fused experts is no linear layer, so that PEFT targets its parameter."""
    parent, _, leaf = module.rpartition(".")
    return leaf == "gate" and f"{parent}.experts.down_proj" in shapes


def _tokens(
    adapter: Adapter,
    tokens: dict[str, Tensor],
    shapes: dict[str, tuple[int, ...]],
    ends: Ends | None,
) -> Iterator[tuple[str, Edit]]:
    """Trainable tokens: the rows of an embedding (or head) at the indices that the config lists."""
    for module, values in tokens.items():
        name = f"{module}.weight"
        indices = _indices(adapter, module, ends)
        shape = shapes.get(name)
        if shape is None or shape[1:] != values.shape[1:] or len(indices) != values.shape[0]:
            raise UserError(
                f"{adapter.origin}: {module} has {values.shape[0]} trained token(s) of "
                f"{values.shape[1:]}, which fit neither trainable_token_indices ({len(indices)}) "
                f"nor the base's {shape}; is it another model's?"
            )
        if not all(0 <= index < shape[0] for index in indices):
            raise UserError(
                f"{adapter.origin}: trainable_token_indices goes up to {max(indices)}, but {name} "
                f"has {shape[0]} rows; is it another model's?"
            )
        yield name, Tokens(values, indices)


def _indices(adapter: Adapter, module: str, ends: Ends | None) -> tuple[int, ...]:
    """A list is the input embedding's, and the tied head's; a dict goes by the end of the path."""
    setting = adapter.config.get("trainable_token_indices") or ()
    if isinstance(setting, dict):
        own = [value for key, value in setting.items() if module.endswith(key)]
        if not own and ends is not None and f"{module}.weight" == ends.head:
            embedding = ends.embedding.removesuffix(".weight")
            own = [value for key, value in setting.items() if embedding.endswith(key)]
        setting = own[0] if own else ()
    return tuple(setting)
