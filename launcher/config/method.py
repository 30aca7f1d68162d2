"""Schema of `method=`: which parameters are trained."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.config.setting import setting


@dataclass(kw_only=True, slots=True)
class MethodConfig:
    name: str = setting(help="the method")


@dataclass(kw_only=True, slots=True)
class FullConfig(MethodConfig):
    """Every parameter is trained."""


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

    def resolved_alpha(self) -> float:
        return 2 * self.rank if self.alpha is None else self.alpha


METHODS: dict[str, type[MethodConfig]] = {"full": FullConfig, "lora": LoraConfig}
