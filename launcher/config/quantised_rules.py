"""The rules of `method=qlora`."""

from __future__ import annotations

from launcher.config import Config
from launcher.config.adapter import adapter_settings
from launcher.config.method import QloraConfig
from launcher.config.rule import Example, Rule, World

COMPUTE = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "pure_bf16": "bfloat16"}


def _quantised(config: Config) -> QloraConfig | None:
    return config.method if isinstance(config.method, QloraConfig) else None


def _is_cast(config: Config, world: World) -> bool:
    method = _quantised(config)
    return method is not None and method.quant_storage not in (
        "uint8",
        COMPUTE[config.precision.name],
    )


def _is_dora(config: Config, world: World) -> bool:
    method = _quantised(config)
    if method is None:
        return False
    return method.dora or bool(adapter_settings(method.adapter or "").get("use_dora"))


def _says_4_bits(config: Config, world: World) -> bool:
    method = _quantised(config)
    if method is None or method.bits == 4:
        return False
    return (method.quant_type, method.quant_storage) != ("nf4", "uint8")


QUANTISED_RULES: tuple[Rule, ...] = (
    Rule(
        "quant-storage-is-not-cast",
        "method.quant_storage is uint8, or the dtype that the precision computes in",
        _is_cast,
        lambda c, w: (
            f"method.quant_storage={c.method.quant_storage} with precision={c.precision.name}: "  # type: ignore[attr-defined]
            f"weights would be cast to {COMPUTE[c.precision.name]}, and their bits lost"
        ),
        lambda c, w: "method.quant_storage=uint8",
        Example("method=qlora method.quant_storage=float16 precision=bf16"),
    ),
    Rule(
        "8bit-has-one-form",
        "method.quant_type and method.quant_storage are left alone with method.bits=8",
        _says_4_bits,
        lambda c, w: (
            f"method.quant_type={c.method.quant_type} method.quant_storage="  # type: ignore[attr-defined]
            f"{c.method.quant_storage} say how 4 bits are held, and method.bits=8"  # type: ignore[attr-defined]
        ),
        lambda c, w: "method.bits=4, or method.quant_type=nf4 method.quant_storage=uint8",
        Example("method=qlora method.bits=8 method.quant_type=fp4"),
    ),
    Rule(
        "pissa-needs-plain-weights",
        "method.pissa begins with the directions of a base that is not quantised",
        lambda c, w: (method := _quantised(c)) is not None and method.pissa,
        lambda c, w: (
            "method.pissa=true takes directions out of the weights, and method=qlora would "
            "quantise what is left: the adapter no longer fits the original base"
        ),
        lambda c, w: "method.pissa=false, or method=lora",
        Example("method=qlora method.pissa=true"),
    ),
    Rule(
        "dora-needs-plain-weights",
        "method.dora measures a base that is not quantised",
        _is_dora,
        lambda c, w: (
            "a DoRA measures the sum of weight and adapter in every forward, which PEFT cannot do "
            "with the quantised weights of method=qlora"
        ),
        lambda c, w: "method=lora, or method.dora=false method.adapter=null",
        Example("method=qlora method.dora=true"),
    ),
)
