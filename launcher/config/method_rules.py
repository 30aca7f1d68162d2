"""The rules of `method=`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.config import Config
from launcher.config.adapter import adapter_folder, adapter_settings
from launcher.config.method import FreezeConfig, LoraConfig
from launcher.config.model_rules import read_settings
from launcher.config.rule import Example, Rule, World
from launcher.config.tensor_names import lacking

# What an adapter's own adapter_config.json says: setting → (its key there, the setting's default).
SAID: dict[str, tuple[str, Any]] = {
    "rank": ("r", 8),
    "alpha": ("lora_alpha", None),
    "rslora": ("use_rslora", False),
    "dora": ("use_dora", False),
}
# What an adapter to go on from fixes, and what another beginning would be lost under.
FIXED = ("target_modules", "modules_to_save", "rank_pattern", "alpha_pattern")
AS_THEY_ARE: dict[str, Any] = {"target_modules": ["all-linear"], "modules_to_save": []}


def _lora(config: Config) -> LoraConfig:
    """The method's settings, or those that break no rule."""
    method = config.method
    return method if isinstance(method, LoraConfig) else LoraConfig(name="lora")


def _goes_on(config: Config) -> str | None:
    """Where an adapter to go on from is."""
    return _lora(config).adapter


def _trains_nothing(config: Config, world: World) -> bool:
    method = config.method
    return isinstance(method, FreezeConfig) and method.layers == 0 and not method.extra_modules


def _unused_modules(config: Config, world: World) -> bool:
    method = config.method
    return (
        isinstance(method, FreezeConfig) and "all" in method.modules and method.modules != ["all"]
    )


def _no_modules(config: Config, world: World) -> bool:
    method = config.method
    return isinstance(method, FreezeConfig) and method.layers != 0 and not method.modules


def _unknown_modules(config: Config) -> dict[str, list[str]]:
    """Module names that the model's files do not have: setting → names."""
    method = config.method
    if not isinstance(method, FreezeConfig):
        return {}
    folder, inside = Path(config.model.name_or_path), [m for m in method.modules if m != "all"]
    found = {
        "modules": lacking(folder, inside),
        "extra_modules": lacking(folder, method.extra_modules),
    }
    return {key: names for key, names in found.items() if names}


def _known_modules(config: Config) -> dict[str, Any]:
    """The settings with those names left out."""
    unknown, method = _unknown_modules(config), config.method
    left = {key: [n for n in getattr(method, key) if n not in unknown[key]] for key in unknown}
    return {key: names or (["all"] if key == "modules" else []) for key, names in left.items()}


def _layers(config: Config) -> int | None:
    """How many layers the model folder says it has, None where it does not say."""
    found = read_settings(Path(config.model.name_or_path)).get("num_hidden_layers")
    return found if isinstance(found, int) else None


def _too_many_layers(config: Config, world: World) -> bool:
    method, there = config.method, _layers(config)
    return isinstance(method, FreezeConfig) and there is not None and abs(method.layers) > there


def _lost_adapters(config: Config) -> list[str]:
    """`setting=path` of each adapter that is not there."""
    method = _lora(config)
    named = [("adapter", path) for path in [method.adapter] if path is not None]
    named += [("merge_first", path) for path in method.merge_first]
    return [f"method.{key}={path}" for key, path in named if adapter_folder(path) is None]


def _contradictions(config: Config) -> dict[str, Any]:
    """Settings that say otherwise than the adapter to go on from: setting → the adapter's value."""
    path = _goes_on(config)
    if path is None or adapter_folder(path) is None:
        return {}
    method, found = _lora(config), adapter_settings(path)
    said = {
        setting: found[key] if key in found else default for setting, (key, default) in SAID.items()
    }
    apart = {
        setting: value
        for setting, value in said.items()
        if getattr(method, setting) not in (SAID[setting][1], value)
    }
    fixed: dict[str, Any] = {setting: AS_THEY_ARE.get(setting, {}) for setting in FIXED}
    return apart | {key: value for key, value in fixed.items() if getattr(method, key) != value}


def _written(values: dict[str, Any]) -> str:
    return " ".join(f"method.{key}={_hydra(value)}" for key, value in values.items())


def _hydra(value: Any) -> str:
    """As it is typed on the command line."""
    if isinstance(value, list):
        return "[" + ",".join(value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _quoted(config: Config) -> str:
    given = _lora(config)
    return " ".join(
        f"method.{key}={_hydra(getattr(given, key))}" for key in _contradictions(config)
    )


# Of rank 4, for the examples.
ADAPTER = {
    "adapter/adapter_config.json": '{"peft_type": "LORA", "r": 4}',
    "adapter/adapter_model.safetensors": "",
}
MODEL = {
    "model/config.json": '{"num_hidden_layers": 2}',
    "model/model.safetensors": "",
    "model/model.safetensors.index.json": (
        '{"weight_map": {"model.layers.0.self_attn.q_proj.weight": "model.safetensors"}}'
    ),
}

METHOD_RULES: tuple[Rule, ...] = (
    Rule(
        "freeze-trains-something",
        "method=freeze trains a layer or a module outside the layers",
        _trains_nothing,
        lambda c, w: "method.layers=0 and method.extra_modules=[]: nothing would be trained",
        lambda c, w: "method.layers=2, or method.extra_modules=[embed_tokens]",
        Example("method=freeze method.layers=0"),
    ),
    Rule(
        "freeze-all-stands-alone",
        "method.modules is [all] or names modules",
        _unused_modules,
        lambda c, w: f"method.modules={_hydra(c.method.modules)}: all is every module of a layer",  # type: ignore[attr-defined]
        lambda c, w: "method.modules=[all]",
        Example("method=freeze method.modules=[all,mlp]"),
    ),
    Rule(
        "freeze-names-modules",
        "method.modules names something where method.layers trains layers",
        _no_modules,
        lambda c, w: (
            f"method.layers={c.method.layers}, and method.modules=[] names nothing inside them"  # type: ignore[attr-defined]
        ),
        lambda c, w: "method.modules=[all], or method.layers=0",
        Example("method=freeze method.modules=[]"),
    ),
    Rule(
        "freeze-names-exist",
        "the modules that method=freeze names are in the model",
        lambda c, w: bool(_unknown_modules(c)),
        lambda c, w: (
            f"{_written(_unknown_modules(c))}: no tensor of {c.model.name_or_path} has such a name"
        ),
        lambda c, w: _written(_known_modules(c)),
        Example("method=freeze method.modules=[attention] model.name_or_path=./model", files=MODEL),
    ),
    Rule(
        "freeze-has-layers",
        "method.layers are no more than the model has",
        _too_many_layers,
        lambda c, w: f"method.layers={c.method.layers}, and the model has {_layers(c)} layers",  # type: ignore[attr-defined]
        lambda c, w: f"method.layers={_layers(c)}, or method=full",
        Example("method=freeze method.layers=9 model.name_or_path=./model", files=MODEL),
    ),
    Rule(
        "pissa-without-dora",
        "method.pissa and method.dora are not used together",
        lambda c, w: _lora(c).pissa and _lora(c).dora,
        lambda c, w: (
            "method.pissa=true moves weights from the base into the adapter, and method.dora=true "
            "measures the base: PEFT cannot turn the two into a plain adapter"
        ),
        lambda c, w: "method.dora=false, or method.pissa=false",
        Example("method.pissa=true method.dora=true"),
    ),
    Rule(
        "dora-without-zero3",
        "method.dora needs base weights whole beside the adapter, which zero3 frees too early",
        lambda c, w: (
            c.strategy.name.startswith("zero3")
            and (_lora(c).dora or bool(adapter_settings(_goes_on(c) or "").get("use_dora")))
        ),
        lambda c, w: (
            f"method.dora=true reads a weight after its layer has run, and strategy="
            f"{c.strategy.name} has freed it by then"
        ),
        lambda c, w: "strategy=fsdp, or method.dora=false",
        Example("method.dora=true strategy=zero3"),
    ),
    Rule(
        "dora-merges-before",
        "method.merge_first and method.dora are not used together",
        lambda c, w: _lora(c).dora and bool(_lora(c).merge_first),
        lambda c, w: (
            "method.dora=true with method.merge_first: a DoRA cannot hold what was merged before it"
        ),
        lambda c, w: (
            "method.merge_first=[], or method.dora=false, or shardway consolidate MODEL --adapter "
            "PATH --output DIR first and model.name_or_path=DIR"
        ),
        Example("method.dora=true method.merge_first=[adapter]", files=ADAPTER),
    ),
    Rule(
        "adapters-are-there",
        "method.adapter and method.merge_first are folders with an adapter, checkpoints or runs",
        lambda c, w: bool(_lost_adapters(c)),
        lambda c, w: (
            f"{', '.join(_lost_adapters(c))} holds no adapter_config.json and "
            "adapter_model.safetensors"
        ),
        lambda c, w: "method.adapter=null method.merge_first=[], or the folders that hold them",
        Example("method.adapter=./adapter"),
    ),
    Rule(
        "adapter-says-its-shape",
        "settings of the adapter's shape are left alone where method.adapter has one",
        lambda c, w: bool(_contradictions(c)),
        lambda c, w: (
            f"{_quoted(c)}, but the adapter {_goes_on(c)} was made otherwise and keeps its shape"
        ),
        lambda c, w: _written(_contradictions(c)),
        Example("method.adapter=adapter method.rank=16", files=ADAPTER),
    ),
    Rule(
        "adapter-has-begun",
        "method.pissa and method.merge_first make a new adapter, and method.adapter has one",
        lambda c, w: _goes_on(c) is not None and (_lora(c).pissa or bool(_lora(c).merge_first)),
        lambda c, w: (
            f"method.adapter={_goes_on(c)} has its beginning, and method.pissa and "
            "method.merge_first make another"
        ),
        lambda c, w: "method.pissa=false method.merge_first=[], or method.adapter=null",
        Example("method.adapter=adapter method.pissa=true", files=ADAPTER),
    ),
)
