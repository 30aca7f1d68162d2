"""Train low-rank adapters beside frozen weights, with PEFT's layers."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from launcher.config.method import LoraConfig
from launcher.errors import UserError
from launcher.export.merge.adapter import PREFIX
from launcher.method import adapters
from launcher.method.base import CPU
from launcher.method.offsets import Base, LowRank, check_same, joined, principal, settings_of
from launcher.model.load import Weights
from launcher.model.peft import (
    LoraLayer,
    ModulesToSaveWrapper,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)

ADAPTER = "default"


class Lora:
    adapter = True
    partial = False
    scheme: dict[str, Any] | None = None

    def __init__(self, config: LoraConfig) -> None:
        self.config = config
        self._offsets: dict[str, LowRank] = {}  # module → what the base was changed by

    def prepare(
        self,
        model: nn.Module,
        seed: int,
        weights: Weights | None = None,
        device: torch.device = CPU,
    ) -> PeftModel:
        """Wrap `model` in PEFT; adapters are fp32 on CPU, A random and B zero, or as the settings
        say. Base weights are read one at a time, and only for those that need them."""
        base, config = Base(weights), self.config
        self._offsets = adapters.merge_first(model, base, config.merge_first)
        self._quantise(model, weights, device)
        wrapped = self._wrap(model)
        torch.manual_seed(seed)
        layers = _layers(wrapped)
        for layer in layers.values():
            _materialize(layer)
        for name, layer in layers.items():
            if config.pissa:
                self._begin_with_principal(name, layer, base)
            if config.dora:
                _measure(layer, base)
        self._copy_saved_modules(wrapped, base)
        if config.adapter is not None:
            self._go_on_from(wrapped, config.adapter)
        return wrapped

    def _quantise(self, model: nn.Module, weights: Weights | None, device: torch.device) -> None:
        """The base stays as it is."""

    def describe(self) -> str | None:
        return None

    def rate(self, name: str) -> float:
        """LoRA+ (https://arxiv.org/abs/2402.12354): B learns faster than A."""
        faster = self.config.plus_ratio is not None and ".lora_B." in name
        return float(self.config.plus_ratio or 1) if faster else 1.0

    def write(self, model: PeftModel, trained: dict[str, torch.Tensor], folder: Path) -> None:
        """A folder that `PeftModel.from_pretrained` loads onto the base. Raises when a tensor is
        missing."""
        expected = {name for name, p in model.named_parameters() if p.requires_grad}
        lost = sorted(expected ^ {name for name, tensor in trained.items() if tensor.numel()})
        if lost:
            raise RuntimeError(f"the gathered adapter lacks or doubles {lost[:3]} ({len(lost)})")
        tensors = _in_peft_names(model, trained)
        if len(tensors) != len(trained):
            raise RuntimeError(f"PEFT kept {len(tensors)} of {len(trained)} adapter tensors")
        config = copy.copy(model.peft_config[ADAPTER])
        if self._offsets:
            every = joined(_factors(model, tensors), self._offsets)
            for module, (low, _) in every.items():
                tensors[f"{PREFIX}{module}.lora_A.weight"] = low.right
                tensors[f"{PREFIX}{module}.lora_B.weight"] = low.left
            for key, value in settings_of(every).items():
                setattr(config, key, value)
            config.target_modules = set(every)
        folder.mkdir(parents=True)
        config.save_pretrained(folder)
        # Not save_file: it makes files that only their owner may read, whatever the umask.
        content = save({name: t.contiguous() for name, t in tensors.items()}, {"format": "pt"})
        (folder / "adapter_model.safetensors").write_bytes(content)

    def read(self, model: PeftModel, folder: Path) -> dict[str, torch.Tensor]:
        stored = load_file(folder / "adapter_model.safetensors")
        self._take_offsets(model, stored)
        return _in_model_names(model, stored, folder)

    def _wrap(self, model: nn.Module) -> PeftModel:
        targets = self.config.target_modules
        if "all-linear" in targets and len(targets) > 1:
            raise UserError(f"method.target_modules={targets}: all-linear stands alone")
        try:
            with warnings.catch_warnings():  # tied weights: export unties them where they differ
                warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
                wrapped = get_peft_model(model, self._peft_config(), autocast_adapter_dtype=False)
        except ValueError as error:
            raise UserError(f"method.target_modules={targets}: {error}") from error
        if self.config.adapter is None:
            _check_targets(wrapped, targets)
            self._check_names(wrapped)
        self._check_saved(wrapped)
        return wrapped

    def _peft_config(self) -> PeftConfig:
        config = self.config
        if config.adapter is not None:
            folder = adapters.folder_of(config.adapter, "method.adapter")
            found = PeftConfig.from_pretrained(folder)
            found.inference_mode, found.lora_dropout = False, config.dropout
            found.base_model_name_or_path = None  # PEFT fills in this run's
            found.init_lora_weights = True
            return found
        targets = config.target_modules
        return PeftConfig(
            r=config.rank,
            lora_alpha=config.resolved_alpha(),
            lora_dropout=config.dropout,
            target_modules="all-linear" if targets == ["all-linear"] else targets,
            use_rslora=config.rslora,
            use_dora=config.dora,
            rank_pattern=dict(config.rank_pattern),
            alpha_pattern=config.resolved_alpha_pattern(),
            modules_to_save=list(config.modules_to_save) or None,
            task_type="CAUSAL_LM",
        )

    def _check_names(self, model: PeftModel) -> None:
        """Every pattern must match a module with an adapter."""
        reached = model.base_model.targeted_module_names
        for key in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(self.config, key):
                if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in reached):
                    raise UserError(f"method.{key}: {pattern} is the name of no adapted module")

    def _check_saved(self, model: PeftModel) -> None:
        saved = [name for name, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
        for wanted in self.config.modules_to_save:
            if not any(name.endswith(f".{wanted}") for name in saved):
                raise UserError(f"method.modules_to_save: {wanted} is the name of no module")
        for module in self._offsets:
            if any(name.endswith(f".{module}") for name in saved):
                raise UserError(
                    f"method.merge_first adapts {module}, which method.modules_to_save trains "
                    "whole; leave it out of one of them"
                )

    def _begin_with_principal(self, name: str, layer: LoraLayer, base: Base) -> None:
        """A and B take the largest directions of the weight, and the base keeps the rest."""
        module, scale = layer.get_base_layer(), layer.scaling[ADAPTER]
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        if len(a) > min(len(b), a.shape[1]):
            raise UserError(f"method.pissa: rank {len(a)} is more than {name} has directions")
        low = principal(base.matrix(module), len(a), self.config.pissa_iterations)
        root = scale**0.5
        low = LowRank((low.left / root).contiguous(), (low.right / root).contiguous())
        a.data.copy_(low.right)
        b.data.copy_(low.left)
        taken = LowRank(-scale * low.left, low.right)
        base.add(module, taken)
        self._offsets[name] = self._offsets[name].beside(taken) if name in self._offsets else taken

    def _copy_saved_modules(self, model: PeftModel, base: Base) -> None:
        for wrapper in model.modules():
            if isinstance(wrapper, ModulesToSaveWrapper):
                base.copies(wrapper.original_module, wrapper.modules_to_save[ADAPTER])

    def _go_on_from(self, model: PeftModel, path: str) -> None:
        folder = adapters.folder_of(path, "method.adapter")
        values = _in_model_names(model, adapters.tensors_of(path), folder)
        parameters = dict(model.named_parameters())
        for name, value in values.items():
            if parameters[name].shape != value.shape:
                raise UserError(f"method.adapter={path} is another model's: {name} {value.shape}")
            holder, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(holder), attribute, nn.Parameter(value.float()))

    def _take_offsets(self, model: PeftModel, stored: dict[str, torch.Tensor]) -> None:
        """Leave of the tensors of a folder what is trained; what is not must be this run's."""
        layers = _layers(model)
        for module, own in self._offsets.items():
            key_a, key_b = (f"{PREFIX}{module}.lora_{side}.weight" for side in "AB")
            if key_a not in stored or key_b not in stored:
                raise UserError(
                    f"the checkpoint does not adapt {module}, and method.merge_first does"
                )
            right, left = stored.pop(key_a), stored.pop(key_b)
            rank, scale = 0, 1.0
            if module in layers:
                rank, scale = layers[module].r[ADAPTER], layers[module].scaling[ADAPTER]
                stored[key_a], stored[key_b] = right[:rank], left[:, :rank]
            check_same(module, LowRank(left[:, rank:] * scale, right[rank:]), own)


def _layers(model: PeftModel) -> dict[str, LoraLayer]:
    """The adapted layers by the module's name in the base."""
    return {
        name.removeprefix(PREFIX): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def _factors(
    model: PeftModel, tensors: dict[str, torch.Tensor]
) -> dict[str, tuple[LowRank, float]]:
    """What each layer's adapter is, of tensors by PEFT's names, with its scale."""
    return {
        name: (
            LowRank(
                tensors[f"{PREFIX}{name}.lora_B.weight"], tensors[f"{PREFIX}{name}.lora_A.weight"]
            ),
            layer.scaling[ADAPTER],
        )
        for name, layer in _layers(model).items()
    }


def _in_peft_names(model: PeftModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the names of PEFT's files."""
    renamed: dict[str, torch.Tensor] = get_peft_model_state_dict(
        model, state_dict=tensors, save_embedding_layers=False
    )
    return renamed


def _in_model_names(
    model: PeftModel, stored: dict[str, torch.Tensor], folder: Path
) -> dict[str, torch.Tensor]:
    """By the names in `model`. Raises UserError when they are not those of its adapter."""
    names = {name: torch.empty(0) for name, p in model.named_parameters() if p.requires_grad}
    # PEFT's own renaming tells which stored name each parameter has.
    stored_name = {id(tensor): name for name, tensor in _in_peft_names(model, names).items()}
    wanted = {name: stored_name[id(tensor)] for name, tensor in names.items()}
    if apart := sorted(stored.keys() ^ set(wanted.values())):
        raise UserError(f"{folder} holds another adapter: {apart[0]} ({len(apart)} tensors)")
    return {name: stored[other] for name, other in wanted.items()}


def _check_targets(model: PeftModel, targets: list[str]) -> None:
    """Every entry must match a module, and every match must be one that export can merge."""
    reached = model.base_model.targeted_module_names
    for target in targets:
        hits = [n for n in reached if n == target or n.endswith(f".{target}")]
        if target != "all-linear" and not hits:
            raise UserError(f"method.target_modules: {target} is the name of no module")
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and isinstance(layer.get_base_layer(), nn.Embedding):
            raise UserError(f"method.target_modules={targets}: embeddings cannot be adapted yet")
    tied = getattr(model.config, "tie_word_embeddings", False)
    if tied and any(name.endswith("lm_head") for name in reached):
        raise UserError(
            f"method.target_modules={targets}: lm_head is tied to the embedding, which an adapter "
            "would change too; leave it out"
        )


def _materialize(layer: LoraLayer) -> None:
    """PEFT puts adapters where the base weight is, on meta: make and start them on CPU."""
    for name in layer.adapter_layer_names:
        holder = getattr(layer, name)
        if ADAPTER in holder:
            holder.to_empty(device="cpu").float()
    layer.reset_lora_parameters(ADAPTER, True)


def _measure(layer: LoraLayer, base: Base) -> None:
    """DoRA's magnitudes: the length of each output's weights (B is zero)."""
    lengths = torch.linalg.norm(base.matrix(layer.get_base_layer()), dim=1)
    layer.lora_magnitude_vector[ADAPTER].weight.data.copy_(lengths)
