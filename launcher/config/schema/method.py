"""Schema of `method=`: which parameters are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launcher.config.schema.setting import setting


@dataclass(kw_only=True, slots=True)
class MethodConfig:
    """The base of all methods."""

    name: str = setting(help="the method")


@dataclass(kw_only=True, slots=True)
class FullConfig(MethodConfig):
    """Every parameter is trained."""


@dataclass(kw_only=True, slots=True)
class FreezeConfig(MethodConfig):
    """Some layers of the model are trained, the rest is frozen."""

    layers: int = setting(2, "layers to train; 2: the last two, -2: the first two, 0: none")
    modules: list[str] = setting(
        ["all"], "modules to train inside those layers, such as self_attn; all: every module"
    )
    extra_modules: list[str] = setting(
        [], "modules to train outside the layers, such as embed_tokens, norm, lm_head"
    )


@dataclass(kw_only=True, slots=True)
class LoraConfig(MethodConfig):
    """Low-rank adapters are trained, the weights are frozen (PEFT)."""

    rank: int = setting(8, "rank (inner dimension) of the adapters", minimum=1)
    alpha: float | None = setting(None, "numerator of the scale; null: 2 × rank", above=0)
    dropout: float = setting(0.0, "dropout before the adapters", minimum=0, maximum=1)
    target_modules: list[str] = setting(
        ["all-linear"],
        "names of modules that get an adapter; all-linear: every linear layer and all experts, but "
        "not the head and no router",
    )
    target_router: bool = setting(
        False, "also adapt the routers of a mixture of experts, which are frozen otherwise"
    )
    rslora: bool = setting(False, "scale by alpha / √rank instead of alpha / rank")
    modules_to_save: list[str] = setting(
        [], "modules that are fully trained besides the adapters, such as embed_tokens or lm_head"
    )
    dora: bool = setting(False, "train the magnitude of each output's weights separately (DoRA)")
    pissa: bool = setting(
        False,
        "initialize with the largest singular directions of the weights, not randomly (PiSSA)",
    )
    pissa_iterations: int | None = setting(
        16,
        "iterations of the fast approximate decomposition for PiSSA; null: the exact, slow one",
        minimum=1,
    )
    plus_ratio: float | None = setting(
        None, "learning rate of B as a multiple of A's (LoRA+); null: the same rate", above=0
    )
    rank_pattern: dict[str, int] = setting(
        {}, "ranks of single modules by the end of their name, such as q_proj: 16", minimum=1
    )
    alpha_pattern: dict[str, float] = setting(
        {}, "alphas of single modules; if alpha is null, the default is 2 × their rank", above=0
    )
    adapter: str | None = setting(
        None,
        "adapter folder, checkpoint or run whose adapter is trained further; sets rank and targets",
    )
    merge_first: list[str] = setting(
        [], "adapters to merge into the model, in this order, before the new one is created"
    )

    def resolved_alpha(self) -> float:
        """`alpha`, or its default if it is null."""
        return 2 * self.rank if self.alpha is None else self.alpha

    def resolved_alpha_pattern(self) -> dict[str, float]:
        """`alpha_pattern`, with the defaults for `rank_pattern` if `alpha` is null."""
        if self.alpha is not None:
            return dict(self.alpha_pattern)
        return {name: 2 * rank for name, rank in self.rank_pattern.items()} | self.alpha_pattern


@dataclass(kw_only=True, slots=True)
class QloraConfig(LoraConfig):
    """Low-rank adapters are trained, the weights are frozen and stored in 4 or 8 bits."""

    bits: int = setting(4, "bits per frozen weight", choices=(4, 8))
    quant_type: str = setting("nf4", "4-bit data type", choices=("nf4", "fp4"))
    double_quant: bool = setting(True, "store the scales of 4-bit blocks in 8 bits")
    quant_storage: str = setting(
        "uint8",
        "dtype of the tensors that store 4-bit weights: uint8 or the precision's compute dtype",
        choices=("uint8", "bfloat16", "float16", "float32"),
    )

    def scheme(self) -> dict[str, Any]:
        """The quantization scheme as in a config.json of transformers (BitsAndBytesConfig)."""
        if self.bits == 8:
            return {"quant_method": "bitsandbytes", "load_in_8bit": True}
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.double_quant,
        }


METHODS: dict[str, type[MethodConfig]] = {
    "full": FullConfig,
    "freeze": FreezeConfig,
    "lora": LoraConfig,
    "qlora": QloraConfig,
}
