"""Which parameters are trained, and what of them is kept."""

from __future__ import annotations

from launcher.config.method import MethodConfig
from launcher.method.base import Method
from launcher.method.freeze import Freeze
from launcher.method.full import Full
from launcher.method.lora import Lora
from launcher.method.qlora import Qlora

METHODS: dict[str, type[Method]] = {
    "full": Full,
    "freeze": Freeze,
    "lora": Lora,
    "qlora": Qlora,
}


def build_method(config: MethodConfig) -> Method:
    return METHODS[config.name](config)
