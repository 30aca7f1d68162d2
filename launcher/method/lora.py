"""Train low-rank adapters beside frozen weights, with PEFT's layers."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save
from torch import nn

from launcher.config.method import LoraConfig
from launcher.errors import UserError

ADAPTER = "default"


class Lora:
    adapter = True

    def __init__(self, config: LoraConfig) -> None:
        self.config = config

    def prepare(self, model: nn.Module, seed: int) -> peft.PeftModel:
        """Wrap `model` in PEFT; adapters are fp32 on CPU, A random and B zero."""
        targets = self.config.target_modules
        if "all-linear" in targets and len(targets) > 1:
            raise UserError(f"method.target_modules={targets}: all-linear stands alone")
        try:
            wrapped = peft.get_peft_model(
                model,
                peft.LoraConfig(
                    r=self.config.rank,
                    lora_alpha=self.config.resolved_alpha(),
                    lora_dropout=self.config.dropout,
                    target_modules="all-linear" if targets == ["all-linear"] else targets,
                    use_rslora=self.config.rslora,
                    task_type="CAUSAL_LM",
                ),
                autocast_adapter_dtype=False,
            )
        except ValueError as error:
            raise UserError(f"method.target_modules={targets}: {error}") from error
        _check_targets(wrapped, targets)
        torch.manual_seed(seed)
        for layer in wrapped.modules():
            if isinstance(layer, LoraLayer):
                _materialize(layer)
        return wrapped

    def write(self, model: peft.PeftModel, trained: dict[str, torch.Tensor], folder: Path) -> None:
        """A folder that `PeftModel.from_pretrained` loads. Raises when a tensor is missing."""
        expected = {name for name, p in model.named_parameters() if p.requires_grad}
        lost = sorted(expected ^ {name for name, tensor in trained.items() if tensor.numel()})
        if lost:
            raise RuntimeError(f"the gathered adapter lacks or doubles {lost[:3]} ({len(lost)})")
        tensors = peft.get_peft_model_state_dict(
            model, state_dict=trained, save_embedding_layers=False
        )
        if len(tensors) != len(trained):
            raise RuntimeError(f"PEFT kept {len(tensors)} of {len(trained)} adapter tensors")
        folder.mkdir(parents=True)
        model.peft_config[ADAPTER].save_pretrained(folder)
        # Not save_file: it makes files that only their owner may read, whatever the umask.
        content = save({name: t.contiguous() for name, t in tensors.items()}, {"format": "pt"})
        (folder / "adapter_model.safetensors").write_bytes(content)

    def read(self, model: peft.PeftModel, folder: Path) -> dict[str, torch.Tensor]:
        stored = load_file(folder / "adapter_model.safetensors")
        names = {name: torch.empty(0) for name, p in model.named_parameters() if p.requires_grad}
        # PEFT's own renaming tells which stored name each parameter has.
        renamed = peft.get_peft_model_state_dict(
            model, state_dict=names, save_embedding_layers=False
        )
        stored_name = {id(tensor): name for name, tensor in renamed.items()}
        wanted = {name: stored_name[id(tensor)] for name, tensor in names.items()}
        if apart := sorted(stored.keys() ^ set(wanted.values())):
            raise UserError(f"{folder} holds another adapter: {apart[0]} ({len(apart)} tensors)")
        return {name: stored[other] for name, other in wanted.items()}


def _check_targets(model: peft.PeftModel, targets: list[str]) -> None:
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
