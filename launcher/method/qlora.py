"""Train low-rank adapters beside a frozen base that is held in 4 or 8 bits."""

from __future__ import annotations

import torch
from torch import nn

from launcher.config.method import QloraConfig
from launcher.method.lora import Lora
from launcher.model.load import Weights
from launcher.model.quantised import Format, quantise


class Qlora(Lora):
    config: QloraConfig

    def __init__(self, config: QloraConfig) -> None:
        super().__init__(config)
        self._done: str | None = None

    def describe(self) -> str | None:
        return self._done

    def _quantise(self, model: nn.Module, weights: Weights | None, device: torch.device) -> None:
        """After adapters were merged into the base, and before the new one is made."""
        kept = self.config.modules_to_save
        self._done = quantise(model, self._form(), weights, device, kept)
        embedding = model.get_input_embeddings().weight  # type: ignore[operator]
        self.scheme = self.config.scheme() | {
            "dtype": str(embedding.dtype).removeprefix("torch."),  # weights are multiplied in
            "merged_first": bool(self._offsets),
        }
        if kept:  # transformers leaves the head alone only where nothing is named
            head = model.get_output_embeddings()  # type: ignore[operator]
            heads = [name for name, module in model.named_modules() if module is head]
            self.scheme["llm_int8_skip_modules"] = [*heads, *kept]

    def _form(self) -> Format:
        from launcher.model.formats import EightBit, FourBit  # bitsandbytes loads for a second

        config = self.config
        if config.bits == 8:
            return EightBit()
        storage: torch.dtype = getattr(torch, config.quant_storage)
        return FourBit(config.quant_type, config.double_quant, storage)
