"""About how much memory a run needs, by arithmetic alone: what `strategy=auto` decides by.

`shardway plan` runs the training code instead and is exact, but takes seconds and torch. This
estimate is to lie a little above it (tests/run/test_footprint.py). Imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config import Config
from launcher.config.schema.method import FreezeConfig, LoraConfig, QloraConfig
from launcher.config.schema.optimizer import SgdConfig
from launcher.config.schema.training import TrainingConfig
from launcher.folders.json_file import read_object_or_empty
from launcher.folders.model import CONFIG
from launcher.folders.tensor_entries import tensor_entries
from launcher.folders.vocabulary import config_value, is_embedding, stated_tie

Shapes = dict[str, tuple[int, ...]]  # name of a tensor → its shape

COMPUTE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "pure_bf16": 2}
# Bytes of moments for a trained parameter with fp32 masters (docs/optimizers.md).
MOMENT_BYTES = {"adamw": 8.0, "adamw_paged": 8.0, "adamw_8bit": 2.1, "lion": 4.0, "sgd": 4.0}
QUANTIZED_BYTES = {4: 0.54, 8: 1.02}  # of a weight, with its scales
# Numbers kept for backward for each token of a layer: of the width, and of the gated MLP's width.
KEPT_WIDTHS, KEPT_MLP_WIDTHS = 11, 4
CHUNK_ELEMENTS = 2**25  # as launcher/model/chunked_loss.py, which imports torch
CHUNK_BYTES = 16  # logits, their softmax and gradient, with what is left of the chunk before
LOGITS_BYTES = 12  # the same for each of the whole logits
LAYER = re.compile(r"\.(\d+)\.")
# Types of models for which transformers has no other attention than eager, which keeps the scores
# of all pairs of tokens.
EAGER_TYPES = frozenset({
    "big_bird", "blip", "bloom", "codegen", "cpmant", "deepseek_v4", "flint", "gemma2", "git",
    "got_ocr2", "gpt_neo", "gpt_neox_japanese", "gpt_oss", "gptj", "granite_swa",
    "granitemoe_swa", "hy_v4", "inkling2", "inkling2_text", "megatron-bert", "mimo_v2_flash",
    "mpt", "openai-gpt", "pp_chart2table", "reformer", "rembert", "roformer", "trocr",
    "vaultgemma", "xglm", "xlm", "xlnet",
})  # fmt: skip


@dataclass(frozen=True)
class Footprint:
    """The bytes that a rank needs on its device."""

    replica: int  # the complete train state, with working copies
    shared: int  # of these, what fsdp divides by its ranks
    gathered: int  # what fsdp gathers at a time
    working: int  # activations, logits and messages, under every strategy

    def complete(self) -> int:
        """With the complete state on every rank."""
        return self.replica + self.working

    def sharded(self, ranks: int) -> int:
        """With the state divided among `ranks`."""
        return math.ceil(self.shared / ranks) + self.gathered + self.working


@dataclass(frozen=True)
class Dims:
    """The sizes of a model."""

    width: int
    mlp_width: int  # of the part that computes for one token
    layers: int
    heads: int
    vocabulary: int


def estimate(config: Config, folder: Path) -> Footprint | None:
    """The memory of a run of `config`, whose precision is chosen. None if the model in `folder`
    does not say enough."""
    described = read_object_or_empty(folder / CONFIG)
    dims = _read_dims(described)
    shapes, beside = _split_composite(described, _read_shapes(folder, described, dims))
    if dims is None or not shapes:
        return None
    compute = COMPUTE_BYTES[config.precision.name]
    master = 2 if config.precision.name == "pure_bf16" else 4
    trained = _trained_parameters(config, shapes)
    frozen = 0.0
    if config.method.name != "full":
        total = sum(map(math.prod, shapes.values()))
        frozen = _frozen_bytes(config, shapes, total, trained, compute)
    frozen += sum(map(math.prod, beside.values())) * compute
    # Master weight, gradient (summed in the master's dtype) and moments.
    shared = frozen + trained * (2 * master + _moments(config, master))
    layer = _bytes_of_largest_layer(shapes, compute)
    # A layer computes while the next is gathered. What arrives is copied once more, which shows in
    # the peak if layers are large beside their activations: those with experts.
    gathered_layers = 3 if any(_is_expert(name, shape) for name, shape in shapes.items()) else 2
    head = dims.vocabulary * dims.width * compute
    return Footprint(
        replica=math.ceil(shared + trained * compute),
        shared=math.ceil(shared),
        # The head stays from forward to backward.
        gathered=math.ceil(gathered_layers * layer + head),
        working=_working_bytes(config, dims, compute, _score_bytes(config, described, compute)),
    )


def checkpoint_bytes(config: Config, folder: Path) -> int | None:
    """About what a checkpoint of `config` needs on disk: the trained parameters and, if it can be
    resumed, their moments; without an adapter also the frozen ones. None if the model in `folder`
    does not say enough."""
    described = read_object_or_empty(folder / CONFIG)
    shapes = _read_shapes(folder, described, _read_dims(described))
    if not shapes:
        return None
    master = 2 if config.precision.name == "pure_bf16" else 4
    trained = _trained_parameters(config, shapes)
    moments = _moments(config, master) if config.checkpoint.content == "all" else 0
    is_adapter = isinstance(config.method, LoraConfig)
    frozen = 0 if is_adapter else sum(map(math.prod, shapes.values())) - trained
    return math.ceil(trained * (master + moments) + frozen * 2)


def _read_dims(described: dict[str, Any]) -> Dims | None:
    def read(*keys: str) -> int | None:
        values = (config_value(described, key) for key in keys)
        return next((value for value in values if type(value) is int and value > 0), None)

    width, layers = read("hidden_size", "n_embd"), read("num_hidden_layers", "n_layer")
    vocabulary = read("vocab_size")
    if width is None or layers is None or vocabulary is None:
        return None
    mlp = read("intermediate_size", "n_inner") or 4 * width
    if experts := read("num_experts_per_tok"):
        shared = read("n_shared_experts") or 0
        mlp = (experts + shared) * (read("moe_intermediate_size") or mlp)
    return Dims(width, mlp, layers, read("num_attention_heads", "n_head") or 1, vocabulary)


def _read_shapes(folder: Path, described: dict[str, Any], dims: Dims | None) -> Shapes:
    """The tensors of the model: from its files, or if these are not here (or packed) as those of a
    Llama of these dims."""
    if config_value(described, "quantization_config") is None and (found := tensor_entries(folder)):
        return {name: entry.shape for name, entry in found.items()}
    return {} if dims is None else _llama_shapes(described, dims)


def _split_composite(described: dict[str, Any], shapes: Shapes) -> tuple[Shapes, Shapes]:
    """The tensors of the text model, which are those beside its embedding and its head, and the
    others of a composite: towers for pictures and sound, which stay frozen."""
    embeddings = [name for name in shapes if is_embedding(name)]
    if not isinstance(described.get("text_config"), dict) or len(embeddings) != 1:
        return shapes, {}
    (embedding,) = embeddings
    path = ".".join(embedding.split(".")[:-2])
    text = {
        name: shape
        for name, shape in shapes.items()
        if not path or name.startswith(f"{path}.") or shape == shapes[embedding]
    }
    return text, {name: shape for name, shape in shapes.items() if name not in text}


def _score_bytes(config: Config, described: dict[str, Any], compute: int) -> int:
    """Bytes that attention keeps for each pair of tokens; 0 if it does not keep their scores."""
    sections = (described, described.get("text_config"))
    kinds = {each.get("model_type") for each in sections if isinstance(each, dict)}
    choice = config.model.attention
    if choice != "eager" and (choice != "sdpa" or EAGER_TYPES.isdisjoint(kinds)):
        return 0
    if "gpt_oss" in kinds:
        return 2 * compute  # its softmax is not in fp32
    is_capped = "gemma2" in kinds or config_value(described, "attn_logit_softcapping")
    return (3 if is_capped else 2) * compute + 4


def _llama_shapes(described: dict[str, Any], dims: Dims) -> Shapes:
    def size(key: str, default: int) -> int:
        value = config_value(described, key)
        return value if type(value) is int and value > 0 else default

    width, head = dims.width, size("head_dim", dims.width // dims.heads)
    queries, keys = dims.heads * head, size("num_key_value_heads", dims.heads) * head
    experts = size("num_local_experts", size("num_experts", size("n_routed_experts", 0)))
    mlp = size("moe_intermediate_size", size("intermediate_size", 4 * width))
    layer: Shapes = {
        "self_attn.q_proj.weight": (queries, width),
        "self_attn.k_proj.weight": (keys, width),
        "self_attn.v_proj.weight": (keys, width),
        "self_attn.o_proj.weight": (width, queries),
    }
    if experts:
        layer["mlp.experts.gate_up_proj"] = (experts, 2 * mlp, width)
        layer["mlp.experts.down_proj"] = (experts, width, mlp)
    else:
        names = ("gate_proj", "up_proj", "down_proj")
        layer |= {f"mlp.{name}.weight": (mlp, width) for name in names}
    shapes = {
        f"model.layers.{at}.{name}": shape
        for at in range(dims.layers)
        for name, shape in layer.items()
    }
    shapes["model.embed_tokens.weight"] = (dims.vocabulary, width)
    if stated_tie(described) is not True:
        shapes["lm_head.weight"] = (dims.vocabulary, width)
    return shapes


def _trained_parameters(config: Config, shapes: Shapes) -> int:
    method = config.method
    if isinstance(method, LoraConfig):
        adapters = sum(_adapter_parameters(method, name, shape) for name, shape in shapes.items())
        return adapters + _parameters_in(shapes, method.modules_to_save)
    if isinstance(method, FreezeConfig):
        layers = {int(found[1]) for name in shapes if (found := LAYER.search(name))}
        inside = sum(math.prod(shape) for name, shape in shapes.items() if LAYER.search(name))
        share = min(1.0, abs(method.layers) / max(1, len(layers)))
        return math.ceil(inside * share) + _parameters_in(shapes, method.extra_modules)
    return sum(map(math.prod, shapes.values()))


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the weight of a linear layer inside the layers. transformers keeps the
    experts of a layer in one tensor, which is none."""
    return len(shape) == 2 and LAYER.search(name) is not None and ".experts." not in name


def _is_expert(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor has the weights of one expert, or [experts, …] those of all."""
    is_weight = len(shape) >= 2 and not name.endswith("bias")
    return is_weight and LAYER.search(name) is not None and ".experts." in name


def _adapter_parameters(method: LoraConfig, name: str, shape: tuple[int, ...]) -> int:
    module = name.removesuffix(".weight").rpartition(".")[2]
    is_target = method.target_modules == ["all-linear"] or module in method.target_modules
    if not (is_target and (_is_linear(name, shape) or _is_expert(name, shape))):
        return 0
    rank = method.rank_pattern[module] if module in method.rank_pattern else method.rank
    return rank * math.prod(shape[:-2]) * sum(shape[-2:])


def _parameters_in(shapes: Shapes, modules: Collection[str]) -> int:
    """The parameters of `modules`. A head that is tied has those of the embedding."""
    names = {name: set(name.split(".")) for name in shapes}
    found = {name for name, parts in names.items() if parts & set(modules)}
    if "lm_head" in modules and not any("lm_head" in names[name] for name in found):
        found |= {name for name in shapes if is_embedding(name)}
    return sum(math.prod(shapes[name]) for name in found)


def _frozen_bytes(config: Config, shapes: Shapes, total: int, trained: int, compute: int) -> float:
    method = config.method
    if isinstance(method, QloraConfig):
        packed = sum(math.prod(s) for name, s in shapes.items() if _is_linear(name, s))
        return packed * QUANTIZED_BYTES[method.bits] + (total - packed) * compute
    return (total if isinstance(method, LoraConfig) else total - trained) * compute


def _moments(config: Config, master: int) -> float:
    """Bytes for each trained parameter."""
    optimizer = config.optimizer
    if isinstance(optimizer, SgdConfig) and not optimizer.momentum:
        return 0.0
    if optimizer.name not in MOMENT_BYTES:  # adafactor: rows and columns
        return 0.1
    follows_master = optimizer.name in ("adamw", "sgd")
    return MOMENT_BYTES[optimizer.name] * (master / 4 if follows_master else 1)


def _bytes_of_largest_layer(shapes: Shapes, compute: int) -> int:
    sizes: dict[str, int] = {}
    for name, shape in shapes.items():
        if found := LAYER.search(name):
            sizes[found[1]] = sizes.get(found[1], 0) + math.prod(shape)
    return compute * max(sizes.values(), default=0)


def _working_bytes(config: Config, dims: Dims, compute: int, score_bytes: int) -> int:
    training, data = config.training, config.data
    length = -(-data.max_length // data.pad_to_multiple_of) * data.pad_to_multiple_of
    tokens = training.micro_batch_size * length
    layer = tokens * compute * (KEPT_WIDTHS * dims.width + KEPT_MLP_WIDTHS * dims.mlp_width)
    layer += training.micro_batch_size * dims.heads * length**2 * score_bytes
    kept = min(_kept_layers(training, dims.layers), _layers_with_backward(config, dims.layers))
    between = (dims.layers - kept) * tokens * compute * dims.width
    return kept * layer + between + _head_bytes(config, dims, compute, tokens)


def _kept_layers(training: TrainingConfig, layers: int) -> int:
    """The layers whose activations exist at the same time."""
    choice = training.activation_checkpointing
    if choice == "off":
        return layers
    recomputed = layers if choice == "full" else -(-layers // int(choice))
    return layers - recomputed + 1  # one of them is computed again at a time


def _layers_with_backward(config: Config, layers: int) -> int:
    """The layers through which gradients flow: those behind a frozen beginning."""
    method = config.method
    if isinstance(method, FreezeConfig) and method.layers > 0 and not method.extra_modules:
        return min(layers, method.layers)
    return layers


def _head_bytes(config: Config, dims: Dims, compute: int, tokens: int) -> int:
    """The hidden states of the head, and logits."""
    hidden = 4 * tokens * dims.width * 4
    if config.training.loss == "whole":
        return hidden + tokens * dims.vocabulary * LOGITS_BYTES
    is_trained = config.method.name == "full"
    elements = max(CHUNK_ELEMENTS * (4 if is_trained else 1), 64 * dims.vocabulary)
    weight_gradient = dims.vocabulary * dims.width * (4 + compute) if is_trained else 0
    return hidden + min(elements, tokens * dims.vocabulary) * CHUNK_BYTES + weight_gradient
