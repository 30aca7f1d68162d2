"""The rules of `method=qlora`."""

from __future__ import annotations

from launcher.config import Config
from launcher.config.rules.rule import Example, Rule, World
from launcher.config.schema.method import QloraConfig
from launcher.folders.adapter import adapter_settings

# Without auto: the ranks check the rules again when they have chosen.
COMPUTE_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "pure_bf16": "bfloat16"}


def _qlora(config: Config) -> QloraConfig | None:
    return config.method if isinstance(config.method, QloraConfig) else None


def _casts_storage(config: Config, world: World) -> bool:
    method, precision = _qlora(config), config.precision.name
    if method is None or precision not in COMPUTE_DTYPES:
        return False
    return method.quant_storage not in ("uint8", COMPUTE_DTYPES[precision])


def _uses_dora(config: Config, world: World) -> bool:
    method = _qlora(config)
    if method is None:
        return False
    return method.dora or bool(adapter_settings(method.adapter or "").get("use_dora"))


def _has_4bit_settings(config: Config, world: World) -> bool:
    method = _qlora(config)
    if method is None or method.bits == 4:
        return False
    return (method.quant_type, method.quant_storage) != ("nf4", "uint8")


QUANTIZED_RULES: tuple[Rule, ...] = (
    Rule(
        "quant-storage-is-not-cast",
        "method.quant_storage is uint8 or the compute dtype of the precision",
        _casts_storage,
        lambda c, w: (
            f"method.quant_storage={c.method.quant_storage} with precision={c.precision.name}: "  # type: ignore[attr-defined]
            f"casting the stored bits to {COMPUTE_DTYPES[c.precision.name]} would destroy them"
        ),
        lambda c, w: "method.quant_storage=uint8",
        Example("method=qlora method.quant_storage=float16 precision=bf16"),
    ),
    Rule(
        "8bit-has-one-form",
        "method.quant_type and method.quant_storage keep their defaults with method.bits=8",
        _has_4bit_settings,
        lambda c, w: (
            f"method.quant_type={c.method.quant_type} method.quant_storage="  # type: ignore[attr-defined]
            f"{c.method.quant_storage} apply to 4 bits, but method.bits=8"  # type: ignore[attr-defined]
        ),
        lambda c, w: "method.bits=4, or method.quant_type=nf4 method.quant_storage=uint8",
        Example("method=qlora method.bits=8 method.quant_type=fp4"),
    ),
    Rule(
        "pissa-needs-plain-weights",
        "method.pissa needs base weights that are not quantized",
        lambda c, w: (method := _qlora(c)) is not None and method.pissa,
        lambda c, w: (
            "method.pissa=true moves directions from the weights into the adapter, but "
            "method=qlora would quantize the rest: the adapter would not fit the original base"
        ),
        lambda c, w: "method.pissa=false, or method=lora",
        Example("method=qlora method.pissa=true"),
    ),
    Rule(
        "dora-needs-plain-weights",
        "method.dora needs base weights that are not quantized",
        _uses_dora,
        lambda c, w: (
            "DoRA needs the norm of weight plus adapter in every forward, which PEFT cannot "
            "compute with the quantized weights of method=qlora"
        ),
        lambda c, w: "method=lora, or method.dora=false method.adapter=null",
        Example("method=qlora method.dora=true"),
    ),
)
