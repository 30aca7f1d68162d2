"""Which parameters are trained, and which of them are saved."""

from __future__ import annotations

from launcher.config.schema.method import LoraConfig, MethodConfig
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


def build_method(config: MethodConfig, keep_tie: bool = False) -> Method:
    """The method that `config` names, before its `prepare`.

    `keep_tie`: if the embedding is one of the modules that an adapter method trains in full, an
    output head that is tied to it stays tied, and is trained with it.
    """
    method = METHODS[config.name]
    if keep_tie and isinstance(config, LoraConfig):
        assert issubclass(method, Lora)
        return method(config, keep_tie=True)
    return method(config)
