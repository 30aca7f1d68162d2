"""Train low-rank adapters beside a frozen base that is quantized to 4 or 8 bits."""

from __future__ import annotations

import torch
from torch import nn

from launcher.config.schema.method import QloraConfig
from launcher.method.lora import Lora
from launcher.model.adaptable import unadaptable_linears
from launcher.model.load import Weights
from launcher.model.quantized_linear import QuantizationFormat, quantize


class Qlora(Lora):
    """Trains low-rank adapters beside a quantized base."""

    config: QloraConfig

    def __init__(
        self, config: QloraConfig, load_adapter: bool = True, keep_tie: bool = False
    ) -> None:
        super().__init__(config, load_adapter, keep_tie)
        self._description: str | None = None

    def describe(self) -> str | None:
        return self._description

    def _quantize(self, model: nn.Module, weights: Weights | None, device: torch.device) -> None:
        """Runs after adapters are merged into the base, and before the new one is added."""
        not_quantized = [*self.config.modules_to_save, *unadaptable_linears(model)]
        quantization_format = self._quantization_format()
        self._description = quantize(model, quantization_format, weights, device, not_quantized)
        embedding = model.get_input_embeddings().weight  # type: ignore[operator]
        self.quantization_scheme = self.config.scheme() | {
            "dtype": str(embedding.dtype).removeprefix("torch."),  # of the matrix products
            "merged_first": bool(self._initial_deltas),
        }
        if not_quantized:  # transformers skips the head by default only if no module is named
            head = model.get_output_embeddings()  # type: ignore[operator]
            heads = [name for name, module in model.named_modules() if module is head]
            self.quantization_scheme["llm_int8_skip_modules"] = [*heads, *not_quantized]

    def _quantization_format(self) -> QuantizationFormat:
        # Importing bitsandbytes takes a second.
        from launcher.model.bnb_formats import EightBit, FourBit

        config = self.config
        if config.bits == 8:
            return EightBit()
        storage: torch.dtype = getattr(torch, config.quant_storage)
        return FourBit(config.quant_type, config.double_quant, storage)
