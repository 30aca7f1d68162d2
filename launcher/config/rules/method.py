"""The rules of `method=`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.config import Config
from launcher.config.rules.rule import Example, Rule, World
from launcher.config.schema.method import FreezeConfig, LoraConfig
from launcher.folders.adapter import adapter_folder, adapter_settings
from launcher.folders.json_file import read_object_or_empty
from launcher.folders.model import CONFIG, missing_modules

# Settings that the adapter_config.json of method.adapter determines: setting → (its key in that
# file, default of the setting).
ADAPTER_KEYS: dict[str, tuple[str, Any]] = {
    "rank": ("r", 8),
    "alpha": ("lora_alpha", None),
    "rslora": ("use_rslora", False),
    "dora": ("use_dora", False),
}
# Settings that would have no effect on method.adapter, and therefore keep their defaults.
FIXED_DEFAULTS: dict[str, Any] = {
    "target_modules": ["all-linear"],
    "target_router": False,
    "modules_to_save": [],
    "rank_pattern": {},
    "alpha_pattern": {},
}


def _lora(config: Config) -> LoraConfig:
    """The settings of the method, or defaults that break no rule if it has no adapter."""
    method = config.method
    return method if isinstance(method, LoraConfig) else LoraConfig(name="lora")


def _existing_adapter(config: Config) -> str | None:
    """The path of the adapter to train further."""
    return _lora(config).adapter


def _freeze(config: Config) -> FreezeConfig:
    """The settings of method=freeze, which is selected when its rules are broken."""
    assert isinstance(config.method, FreezeConfig)
    return config.method


def _trains_nothing(config: Config, world: World) -> bool:
    method = config.method
    return isinstance(method, FreezeConfig) and method.layers == 0 and not method.extra_modules


def _all_is_not_alone(config: Config, world: World) -> bool:
    method = config.method
    return (
        isinstance(method, FreezeConfig) and "all" in method.modules and method.modules != ["all"]
    )


def _no_modules(config: Config, world: World) -> bool:
    method = config.method
    return isinstance(method, FreezeConfig) and method.layers != 0 and not method.modules


def _unknown_modules(config: Config) -> dict[str, list[str]]:
    """Module names that do not occur in the model: setting → names."""
    method = config.method
    if not isinstance(method, FreezeConfig):
        return {}
    folder = Path(config.model.name_or_path)
    layer_modules = [module for module in method.modules if module != "all"]
    missing = {
        "modules": missing_modules(folder, layer_modules),
        "extra_modules": missing_modules(folder, method.extra_modules),
    }
    return {key: names for key, names in missing.items() if names}


def _known_modules(config: Config) -> dict[str, list[str]]:
    """The same settings without the unknown names."""
    unknown, method = _unknown_modules(config), config.method
    known = {key: [n for n in getattr(method, key) if n not in unknown[key]] for key in unknown}
    return {key: names or (["all"] if key == "modules" else []) for key, names in known.items()}


def _model_layers(config: Config) -> int | None:
    """The number of layers in the model's config.json, None if it does not contain it."""
    settings = read_object_or_empty(Path(config.model.name_or_path) / CONFIG)
    layers = settings.get("num_hidden_layers")
    return layers if isinstance(layers, int) else None


def _too_many_layers(config: Config, world: World) -> bool:
    method, layers = config.method, _model_layers(config)
    return isinstance(method, FreezeConfig) and layers is not None and abs(method.layers) > layers


def _missing_adapters(config: Config) -> list[str]:
    """`setting=path` of each adapter that does not exist."""
    method = _lora(config)
    paths = [("adapter", path) for path in [method.adapter] if path is not None]
    paths += [("merge_first", path) for path in method.merge_first]
    return [f"method.{key}={path}" for key, path in paths if adapter_folder(path) is None]


def _contradictions(config: Config) -> dict[str, Any]:
    """Settings that contradict the adapter to train further: setting → the adapter's value."""
    path = _existing_adapter(config)
    if path is None or adapter_folder(path) is None:
        return {}
    method, adapter = _lora(config), adapter_settings(path)
    differing: dict[str, Any] = {}
    for setting, (key, default) in ADAPTER_KEYS.items():
        value = adapter[key] if key in adapter else default
        if getattr(method, setting) not in (default, value):
            differing[setting] = value
    return differing | {
        setting: default
        for setting, default in FIXED_DEFAULTS.items()
        if getattr(method, setting) != default
    }


def _overrides(values: dict[str, Any]) -> str:
    return " ".join(f"method.{key}={_hydra_value(value)}" for key, value in values.items())


def _hydra_value(value: Any) -> str:
    """`value` as it is typed on the command line."""
    if isinstance(value, list):
        return "[" + ",".join(value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _contradicting_overrides(config: Config) -> str:
    method = _lora(config)
    return _overrides({key: getattr(method, key) for key in _contradictions(config)})


# An adapter of rank 4 and a model with two layers, for the examples.
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
        "method=freeze trains at least one layer or one module outside the layers",
        _trains_nothing,
        lambda c, w: "method.layers=0 and method.extra_modules=[]: nothing would be trained",
        lambda c, w: "method.layers=2, or method.extra_modules=[embed_tokens]",
        Example("method=freeze method.layers=0"),
    ),
    Rule(
        "freeze-all-stands-alone",
        "method.modules is either [all] or a list of names",
        _all_is_not_alone,
        lambda c, w: (
            f"method.modules={_hydra_value(_freeze(c).modules)}: all already selects every module"
        ),
        lambda c, w: "method.modules=[all]",
        Example("method=freeze method.modules=[all,mlp]"),
    ),
    Rule(
        "freeze-names-modules",
        "method.modules is not empty if method.layers selects layers",
        _no_modules,
        lambda c, w: (
            f"method.layers={_freeze(c).layers}, but method.modules=[] selects nothing in them"
        ),
        lambda c, w: "method.modules=[all], or method.layers=0",
        Example("method=freeze method.modules=[]"),
    ),
    Rule(
        "freeze-names-exist",
        "the modules that method=freeze names exist in the model",
        lambda c, w: bool(_unknown_modules(c)),
        lambda c, w: (
            f"{_overrides(_unknown_modules(c))}: no tensor of {c.model.name_or_path} has this name"
        ),
        lambda c, w: _overrides(_known_modules(c)),
        Example("method=freeze method.modules=[attention] model.name_or_path=./model", files=MODEL),
    ),
    Rule(
        "freeze-has-layers",
        "method.layers is at most the number of layers of the model",
        _too_many_layers,
        lambda c, w: (
            f"method.layers={_freeze(c).layers}, but the model has {_model_layers(c)} layers"
        ),
        lambda c, w: f"method.layers={_model_layers(c)}, or method=full",
        Example("method=freeze method.layers=9 model.name_or_path=./model", files=MODEL),
    ),
    Rule(
        "pissa-without-dora",
        "method.pissa and method.dora are not used together",
        lambda c, w: _lora(c).pissa and _lora(c).dora,
        lambda c, w: (
            "method.pissa=true moves weights from the base into the adapter, and method.dora=true "
            "uses the norm of the base: PEFT cannot convert the combination into a plain adapter"
        ),
        lambda c, w: "method.dora=false, or method.pissa=false",
        Example("method.pissa=true method.dora=true"),
    ),
    Rule(
        "dora-without-zero3",
        "method.dora is not used with zero3, which frees the base weights too early",
        lambda c, w: (
            c.strategy.name.startswith("zero3")
            and (
                _lora(c).dora or bool(adapter_settings(_existing_adapter(c) or "").get("use_dora"))
            )
        ),
        lambda c, w: (
            f"method.dora=true reads a weight after its layer has run, but strategy="
            f"{c.strategy.name} has already freed it"
        ),
        lambda c, w: "strategy=fsdp, or method.dora=false",
        Example("method.dora=true strategy=zero3"),
    ),
    Rule(
        "dora-merges-before",
        "method.merge_first and method.dora are not used together",
        lambda c, w: _lora(c).dora and bool(_lora(c).merge_first),
        lambda c, w: (
            "method.dora=true with method.merge_first: a DoRA adapter cannot store merged adapters"
        ),
        lambda c, w: (
            "method.merge_first=[], or method.dora=false, or shardway consolidate MODEL --adapter "
            "PATH --output DIR first and model.name_or_path=DIR"
        ),
        Example("method.dora=true method.merge_first=[adapter]", files=ADAPTER),
    ),
    Rule(
        "adapters-are-there",
        "method.adapter and method.merge_first are adapter folders, checkpoints or runs",
        lambda c, w: bool(_missing_adapters(c)),
        lambda c, w: (
            f"{', '.join(_missing_adapters(c))} contains no adapter_config.json and "
            "adapter_model.safetensors"
        ),
        lambda c, w: "method.adapter=null method.merge_first=[], or the paths of existing adapters",
        Example("method.adapter=./adapter"),
    ),
    Rule(
        "adapter-says-its-shape",
        "settings of the adapter's shape agree with the adapter of method.adapter",
        lambda c, w: bool(_contradictions(c)),
        lambda c, w: (
            f"{_contradicting_overrides(c)}, but the adapter {_existing_adapter(c)} has other "
            "values and keeps them"
        ),
        lambda c, w: _overrides(_contradictions(c)),
        Example("method.adapter=adapter method.rank=16", files=ADAPTER),
    ),
    Rule(
        "adapter-has-begun",
        "method.pissa and method.merge_first are only used for a new adapter",
        lambda c, w: (
            _existing_adapter(c) is not None and (_lora(c).pissa or bool(_lora(c).merge_first))
        ),
        lambda c, w: (
            f"method.adapter={_existing_adapter(c)} is an existing adapter, but method.pissa and "
            "method.merge_first are for a new one"
        ),
        lambda c, w: "method.pissa=false method.merge_first=[], or method.adapter=null",
        Example("method.adapter=adapter method.pissa=true", files=ADAPTER),
    ),
)
