"""Which parameters are trained, and which of them are saved."""

from __future__ import annotations

from launcher.config.schema.method import MethodConfig
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
    """The method that `config` names, before its `prepare`."""
    return METHODS[config.name](config)
