"""The rules of `model=`, asked of the files in its folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from launcher import paths
from launcher.config import Config
from launcher.config.rule import Example, Rule, World

FLASH = "flash_attention_2"


def is_hub_id(name_or_path: str) -> bool:
    """`owner/name` that is no folder here: transformers would ask the hub for it."""
    return bool(re.fullmatch(r"[\w-]+/[\w.-]+", name_or_path)) and not Path(name_or_path).exists()


def read_settings(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A JSON file of a model folder. Empty where it is not there or damaged: other rules and the
    loader say so."""
    try:
        read = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return read if isinstance(read, dict) else {}


def _missing(config: Config, world: World) -> bool:
    where = config.model.name_or_path
    return not is_hub_id(where) and not (Path(where) / "config.json").is_file()


def _weightless(config: Config, world: World) -> bool:
    folder = Path(config.model.name_or_path)
    return (folder / "config.json").is_file() and not any(folder.glob("*.safetensors"))


def _quantisation(config: Config) -> str | None:
    """How the weights of a local folder are quantised, None if they are not."""
    settings = read_settings(Path(config.model.name_or_path))
    if not isinstance(how := settings.get("quantization_config"), dict):
        return None
    return str(how["quant_method"]) if "quant_method" in how else "an unknown method"


def _cannot_chat(config: Config, world: World) -> bool:
    """A tokenizer without a chat template, where rows are conversations. Of a hub id nothing is
    known yet, and Python code that the model brings along may set one."""
    folder = Path(config.model.name_or_path)
    if config.data.format == "text" or config.data.template or config.model.trust_remote_code:
        return False
    if not (folder / "tokenizer_config.json").is_file():
        return False  # no tokenizer at all: the loader says so
    beside = (folder / "chat_template.jinja", folder / "additional_chat_templates")
    settings = read_settings(folder, "tokenizer_config.json")
    return not settings.get("chat_template") and not any(place.exists() for place in beside)


def _flash(config: Config) -> bool:
    return config.model.attention == FLASH


MODEL_RULES: tuple[Rule, ...] = (
    Rule(
        "model-is-there",
        "model.name_or_path is a model folder or a hub id",
        _missing,
        lambda c, w: (
            f"model.name_or_path={c.model.name_or_path} is no model folder (no config.json)"
        ),
        lambda c, w: (
            f"shardway fetch {c.model.name}"
            if Path(c.model.name_or_path).is_relative_to(paths.cache())
            else "model.name_or_path=FOLDER, or a hub id such as owner/name"
        ),
        Example("model.name_or_path=./model"),
    ),
    Rule(
        "revision-is-of-the-hub",
        "model.revision comes with a hub id",
        lambda c, w: c.model.revision is not None and not is_hub_id(c.model.name_or_path),
        lambda c, w: (
            f"model.revision={c.model.revision} chooses among the commits of a hub id, and "
            f"model.name_or_path={c.model.name_or_path} is a folder"
        ),
        lambda c, w: "model.revision=null, or model.name_or_path=OWNER/NAME",
        Example("model.revision=main"),
    ),
    Rule(
        "model-has-safetensors",
        "the model folder holds safetensors",
        _weightless,
        lambda c, w: f"model.name_or_path={c.model.name_or_path} holds no *.safetensors",
        lambda c, w: (
            "convert it once: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        ),
        Example("model.name_or_path=./model", files={"model/config.json": "{}"}),
    ),
    Rule(
        "model-is-not-quantised",
        "the model's weights are not quantised",
        lambda c, w: _quantisation(c) is not None,
        lambda c, w: (
            f"model.name_or_path={c.model.name_or_path} is quantised ({_quantisation(c)}): its "
            "numbers are not weights that can be trained or merged"
        ),
        lambda c, w: "model.name_or_path=FOLDER of the 16-bit original",
        Example(
            "model.name_or_path=./model",
            files={
                "model/config.json": '{"quantization_config": {"quant_method": "fp8"}}',
                "model/model.safetensors": "",
            },
        ),
    ),
    Rule(
        "chat-has-a-template",
        "the tokenizer has a chat template where rows are conversations",
        _cannot_chat,
        lambda c, w: (
            f"the tokenizer of model.name_or_path={c.model.name_or_path} has no chat template, and "
            f"data.format={c.data.format} makes a conversation of every row"
        ),
        lambda c, w: (
            f"put a chat_template.jinja into {c.model.name_or_path} (an instruct model of the same "
            "family has one), or data=pretrain data.path=FILE for raw text"
        ),
        Example(
            "model.name_or_path=./model",
            files={
                "model/config.json": "{}",
                "model/model.safetensors": "",
                "model/tokenizer_config.json": '{"eos_token": "</s>"}',
            },
        ),
    ),
    Rule(
        "flash-attention-needs-a-gpu",
        f"model.attention={FLASH} runs on GPUs",
        lambda c, w: _flash(c) and w.gpus == 0,
        lambda c, w: f"model.attention={FLASH} runs on GPUs, and none can be seen",
        lambda c, w: "model.attention=sdpa",
        Example(f"model.attention={FLASH} precision=bf16", gpus=0),
    ),
    Rule(
        "flash-attention-is-installed",
        f"model.attention={FLASH} comes with the package flash-attn",
        lambda c, w: _flash(c) and w.gpus > 0 and not w.flash_attention,
        lambda c, w: f"model.attention={FLASH} is the package flash-attn, which is not installed",
        lambda c, w: "model.attention=sdpa, or pip install flash-attn --no-build-isolation",
        Example(f"model.attention={FLASH} precision=bf16", gpus=1),
    ),
    Rule(
        "flash-attention-needs-16-bits",
        f"model.attention={FLASH} computes in bf16 or fp16",
        lambda c, w: _flash(c) and c.precision.name == "fp32",
        lambda c, w: (
            f"model.attention={FLASH} computes in bf16 or fp16, and precision=fp32 does not"
        ),
        lambda c, w: "precision=bf16, or model.attention=sdpa",
        Example(f"model.attention={FLASH} precision=fp32", gpus=1, flash_attention=True),
    ),
)
