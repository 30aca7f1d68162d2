"""Schema of `method=`: which parameters are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launcher.config.setting import setting


@dataclass(kw_only=True, slots=True)
class MethodConfig:
    name: str = setting(help="the method")


@dataclass(kw_only=True, slots=True)
class FullConfig(MethodConfig):
    """Every parameter is trained."""


@dataclass(kw_only=True, slots=True)
class FreezeConfig(MethodConfig):
    """Some layers of the model are trained, the rest stays as it is."""

    layers: int = setting(
        2, "layers that are trained: 2 is the last two, -2 the first two, 0 none of them"
    )
    modules: list[str] = setting(
        ["all"], "modules inside those layers that are trained, such as self_attn; all is every one"
    )
    extra_modules: list[str] = setting(
        [], "modules outside the layers that are trained too, such as embed_tokens, norm, lm_head"
    )


@dataclass(kw_only=True, slots=True)
class LoraConfig(MethodConfig):
    """Low-rank adapters are trained beside frozen weights (PEFT)."""

    rank: int = setting(8, "inner dimension of the adapters", minimum=1)
    alpha: float | None = setting(None, "scale numerator; null is 2 × rank", above=0)
    dropout: float = setting(0.0, "dropout before the adapters", minimum=0, maximum=1)
    target_modules: list[str] = setting(
        ["all-linear"], "module names that get an adapter; all-linear is every linear but the head"
    )
    rslora: bool = setting(False, "scale by alpha / √rank instead of alpha / rank")
    modules_to_save: list[str] = setting(
        [], "modules that are trained whole beside the adapters, such as embed_tokens or lm_head"
    )
    dora: bool = setting(False, "train the length of each output's weights apart (DoRA)")
    pissa: bool = setting(
        False, "begin with the largest singular directions of the weights instead of at random"
    )
    pissa_iterations: int | None = setting(
        16, "of the fast approximate decomposition; null is the exact and slow one", minimum=1
    )
    plus_ratio: float | None = setting(
        None, "learning rate of B as a multiple of A's (LoRA+); null is the same rate", above=0
    )
    rank_pattern: dict[str, int] = setting(
        {}, "ranks of single modules by the end of their name, as q_proj: 16", minimum=1
    )
    alpha_pattern: dict[str, float] = setting(
        {}, "alphas of single modules; where alpha is null, 2 × their rank", above=0
    )
    adapter: str | None = setting(
        None, "an adapter's folder, checkpoint or run to go on training; it says rank and targets"
    )
    merge_first: list[str] = setting(
        [], "adapters that are merged into the model before the new one is made, in this order"
    )

    def resolved_alpha(self) -> float:
        return 2 * self.rank if self.alpha is None else self.alpha

    def resolved_alpha_pattern(self) -> dict[str, float]:
        if self.alpha is not None:
            return dict(self.alpha_pattern)
        return {name: 2 * rank for name, rank in self.rank_pattern.items()} | self.alpha_pattern


@dataclass(kw_only=True, slots=True)
class QloraConfig(LoraConfig):
    """Low-rank adapters are trained beside frozen weights that are held in 4 or 8 bits."""

    bits: int = setting(4, "of a frozen weight", choices=(4, 8))
    quant_type: str = setting("nf4", "values that 4 bits stand for", choices=("nf4", "fp4"))
    double_quant: bool = setting(True, "hold the scales of 4-bit blocks in 8 bits")
    quant_storage: str = setting(
        "uint8",
        "dtype of the tensors that hold 4-bit weights; another than uint8 must be the precision's",
        choices=("uint8", "bfloat16", "float16", "float32"),
    )

    def scheme(self) -> dict[str, Any]:
        """As a config.json of transformers says it (BitsAndBytesConfig)."""
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
