"""Train low-rank adapters beside frozen weights, with PEFT's layers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from launcher.config.schema.method import LoraConfig
from launcher.errors import UserError
from launcher.folders.adapter import WEIGHTS
from launcher.io.adapter import PREFIX
from launcher.io.readers.safetensors_file import read_tensors
from launcher.method import existing_adapter
from launcher.method.base import CPU
from launcher.method.initial_delta import (
    BaseWeights,
    LowRankDelta,
    add_initial_deltas,
    check_same_delta,
    principal_delta,
    rank_settings,
)
from launcher.method.peft_layers import wrap_existing, wrap_new
from launcher.method.peft_tensors import (
    ADAPTER_NAME,
    in_composite,
    in_model,
    lora_layers,
    tied_names,
    to_model_names,
    to_peft_names,
    trained_deltas,
)
from launcher.method.shared_adapters import share_adapters
from launcher.method.targets import portable
from launcher.model.load import Weights
from launcher.model.peft import LoraLayer, ModulesToSaveWrapper, PeftModel


class Lora:
    """Trains low-rank adapters, and modules in full if `modules_to_save` names some."""

    is_adapter = True
    is_partial = False
    quantization_scheme: dict[str, Any] | None = None

    def __init__(
        self, config: LoraConfig, load_adapter: bool = True, keep_tie: bool = False
    ) -> None:
        """`load_adapter`: read the values of an existing adapter, not only its settings.

        `keep_tie`: a head that is tied to a module in `modules_to_save` is trained with it.
        """
        self.config, self.load_adapter, self.keep_tie = config, load_adapter, keep_tie
        self._tied: dict[str, str] = {}  # another name of a trained parameter → its name
        # Module → the change of the base before training.
        self._initial_deltas: dict[str, LowRankDelta] = {}

    def prepare(
        self,
        model: nn.Module,
        seed: int,
        weights: Weights | None = None,
        device: torch.device = CPU,
    ) -> PeftModel:
        """Wrap `model` in PEFT. Adapters are fp32 on CPU, with A random and B zero unless the
        settings say otherwise. Base weights are read one at a time, and only if they are needed.

        Raises UserError if the settings or an existing adapter do not fit the model.
        """
        base, config = BaseWeights(weights), self.config
        self._initial_deltas = existing_adapter.merge_adapters(model, base, config.merge_first)
        self._quantize(model, weights, device)
        wrapped = self._wrap(model)
        self._tied = tied_names(wrapped)
        torch.manual_seed(seed)
        layers = lora_layers(wrapped)
        for layer in layers.values():
            _materialize(layer)
        for name, layer in layers.items():
            if config.pissa:
                self._initialize_pissa(name, layer, base)
            if config.dora:
                _initialize_dora(layer, base)
        self._copy_saved_modules(wrapped, base)
        if config.adapter is not None and self.load_adapter:
            self._load_adapter(wrapped, config.adapter)
        return wrapped

    def _quantize(self, model: nn.Module, weights: Weights | None, device: torch.device) -> None:
        """Nothing to do; QLoRA quantizes the base here."""

    def describe(self) -> str | None:
        return None

    def lr_multiplier(self, name: str) -> float:
        """LoRA+ (https://arxiv.org/abs/2402.12354): B has a higher learning rate than A."""
        ratio = self.config.plus_ratio
        return float(ratio) if ratio is not None and ".lora_B." in name else 1.0

    def write(self, model: PeftModel, trained: dict[str, torch.Tensor], folder: Path) -> None:
        """Write a folder that `PeftModel.from_pretrained` loads onto the base. Raises RuntimeError
        if a tensor is missing."""
        expected = {name for name, p in model.named_parameters() if p.requires_grad}
        if wrong := sorted(expected ^ {name for name, t in trained.items() if t.numel()}):
            raise RuntimeError(
                f"{len(wrong)} tensors of the gathered adapter are missing or unexpected, such as "
                f"{wrong[:3]}"
            )
        tensors = to_peft_names(model, trained, self._tied)
        if len(tensors) != len(trained) + len(self._tied):
            raise RuntimeError(f"PEFT kept {len(tensors)} of {len(trained)} adapter tensors")
        config, base = copy.copy(model.peft_config[ADAPTER_NAME]), model.base_model
        modules = base.targeted_module_names
        if self._initial_deltas:
            total = add_initial_deltas(trained_deltas(model, tensors), self._initial_deltas)
            for module, (delta, _) in total.items():
                tensors[f"{PREFIX}{module}.lora_A.weight"] = delta.right
                tensors[f"{PREFIX}{module}.lora_B.weight"] = delta.left
            for key, value in rank_settings(total).items():
                setattr(config, key, value)
            config.target_modules = modules = set(total)
        config = portable(config, model, modules, base.targeted_parameter_names)
        folder.mkdir(parents=True)
        config.save_pretrained(folder)
        tensors = in_composite(model, tensors, folder)
        # Not save_file: it creates files that only their owner can read, whatever the umask.
        content = save(_without_shared_memory(tensors), {"format": "pt"})
        (folder / WEIGHTS).write_bytes(content)

    def read(self, model: PeftModel, folder: Path) -> dict[str, torch.Tensor]:
        """Raises UserError if the folder's adapter is not one of this run."""
        saved = in_model(model, read_tensors(folder / WEIGHTS))
        self._remove_initial_deltas(model, saved)
        return to_model_names(model, saved, folder, self._tied)

    def _wrap(self, model: nn.Module) -> PeftModel:
        config = self.config
        keep_tie = self.keep_tie and _is_tied(model)
        if config.adapter is not None:
            folder = existing_adapter.find_adapter(config.adapter, "method.adapter")
            wrapped = wrap_existing(model, config, folder)
        else:
            wrapped = wrap_new(model, config, keep_tie)
        self._check_modules_to_save(wrapped)
        share_adapters(wrapped, config)
        return wrapped

    def _check_modules_to_save(self, model: PeftModel) -> None:
        """Every name must match a module, and none that is also merged first."""
        saved = [name for name, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
        for wanted in self.config.modules_to_save:
            if not any(name.endswith(f".{wanted}") for name in saved):
                raise UserError(f"method.modules_to_save: no module is named {wanted}")
        for module in self._initial_deltas:
            if any(name.endswith(f".{module}") for name in saved):
                raise UserError(
                    f"method.merge_first adapts {module}, which method.modules_to_save trains in "
                    "full; remove it from one of them"
                )

    def _initialize_pissa(self, name: str, layer: LoraLayer, base: BaseWeights) -> None:
        """Move the largest singular directions of the weight from the base to A and B."""
        module, scale = layer.get_base_layer(), layer.scaling[ADAPTER_NAME]
        a, b = layer.lora_A[ADAPTER_NAME].weight, layer.lora_B[ADAPTER_NAME].weight
        if len(a) > min(len(b), a.shape[1]):
            raise UserError(
                f"method.pissa: rank {len(a)} is more than the number of singular directions of "
                f"{name}"
            )
        delta = principal_delta(base.matrix(module), len(a), self.config.pissa_iterations)
        root = scale**0.5
        delta = LowRankDelta((delta.left / root).contiguous(), (delta.right / root).contiguous())
        a.data.copy_(delta.right)
        b.data.copy_(delta.left)
        residual = LowRankDelta(-scale * delta.left, delta.right)
        base.add(module, residual)
        merged = self._initial_deltas.get(name)
        self._initial_deltas[name] = residual if merged is None else merged.plus(residual)

    def _copy_saved_modules(self, model: PeftModel, base: BaseWeights) -> None:
        for wrapper in model.modules():
            if isinstance(wrapper, ModulesToSaveWrapper):
                base.register_copy(wrapper.original_module, wrapper.modules_to_save[ADAPTER_NAME])

    def _load_adapter(self, model: PeftModel, path: str) -> None:
        folder = existing_adapter.find_adapter(path, "method.adapter")
        saved = in_model(model, existing_adapter.read_adapter_tensors(path))
        values = to_model_names(model, saved, folder, self._tied)
        parameters = dict(model.named_parameters())
        for name, value in values.items():
            if parameters[name].shape != value.shape:
                raise UserError(
                    f"method.adapter={path} belongs to another model: the shape of {name} is "
                    f"{list(value.shape)}, not {list(parameters[name].shape)}"
                )
            parameter = nn.Parameter(value.float())
            for each in (name, *(other for other, same in self._tied.items() if same == name)):
                module, _, attribute = each.rpartition(".")
                setattr(model.get_submodule(module), attribute, parameter)

    def _remove_initial_deltas(self, model: PeftModel, saved: dict[str, torch.Tensor]) -> None:
        """Reduce the tensors of a folder to the trained adapter. Raises UserError if the initial
        deltas in it are not those of this run."""
        layers = lora_layers(model)
        for module, current in self._initial_deltas.items():
            key_a, key_b = (f"{PREFIX}{module}.lora_{side}.weight" for side in "AB")
            if key_a not in saved or key_b not in saved:
                raise UserError(
                    f"the checkpoint does not adapt {module}, but method.merge_first does"
                )
            right, left = saved.pop(key_a), saved.pop(key_b)
            rank, scale = 0, 1.0
            if module in layers:
                layer = layers[module]
                rank, scale = layer.r[ADAPTER_NAME], layer.scaling[ADAPTER_NAME]
                saved[key_a], saved[key_b] = right[:rank], left[:, :rank]
            check_same_delta(module, LowRankDelta(left[:, rank:] * scale, right[rank:]), current)


def _without_shared_memory(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tied tensors are copied: safetensors refuses tensors that share memory."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        result[name] = tensor.clone() if id(tensor) in seen else tensor.contiguous()
        seen.add(id(tensor))
    return result


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _materialize(layer: LoraLayer) -> None:
    """PEFT creates adapters on the device of the base weight, meta: initialize them on CPU."""
    for name in layer.adapter_layer_names:
        adapters = getattr(layer, name)
        if ADAPTER_NAME in adapters:
            adapters.to_empty(device="cpu").float()
    layer.reset_lora_parameters(ADAPTER_NAME, True)


def _initialize_dora(layer: LoraLayer, base: BaseWeights) -> None:
    """Set DoRA's magnitudes to the norms of the rows of the weight (B is zero)."""
    norms = torch.linalg.norm(base.matrix(layer.get_base_layer()), dim=1)
    layer.lora_magnitude_vector[ADAPTER_NAME].weight.data.copy_(norms)
