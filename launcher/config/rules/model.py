"""The rules of `model=`, which read the files of a local model folder."""

from __future__ import annotations

import json
from pathlib import Path

from launcher.config import Config
from launcher.config.rules.rule import Example, Machine, Rule, World
from launcher.config.schema.method import LoraConfig
from launcher.folders import paths
from launcher.folders.adapter import adapter_settings
from launcher.folders.json_file import read_object_or_empty
from launcher.folders.model import CONFIG, MODELOPT, is_hub_id
from launcher.folders.quantization import quantization_of
from launcher.folders.vocabulary import find_missing_head, find_separate_head, is_embedding

FLASH_ATTENTION = "flash_attention_2"
# The quantizations that `shardway consolidate` reads; a test compares them with its own.
DEQUANTIZED = ("bitsandbytes", "fp8", "fbgemm_fp8", "modelopt", "mxfp4", "compressed-tensors")


def _is_missing(config: Config, world: World) -> bool:
    path = config.model.name_or_path
    return not is_hub_id(path) and not (Path(path) / CONFIG).is_file()


def _has_no_safetensors(config: Config, world: World) -> bool:
    folder = Path(config.model.name_or_path)
    return (folder / CONFIG).is_file() and not any(folder.glob("*.safetensors"))


def _quantization(config: Config) -> str | None:
    """The method by which the weights of a local folder are quantized, None if they are not."""
    folder = Path(config.model.name_or_path)
    scheme = quantization_of(read_object_or_empty(folder / CONFIG))
    if scheme is not None:
        return str(scheme["quant_method"]) if "quant_method" in scheme else "an unknown method"
    return "modelopt" if (folder / MODELOPT).is_file() else None


def _dequantization(config: Config) -> str:
    """How to make the original of a model that was released quantized only."""
    if _quantization(config) not in DEQUANTIZED:
        return ""
    return (
        ", which `shardway consolidate "
        f"{config.model.name_or_path} --output FOLDER` makes of this one"
    )


def _has_no_chat_template(config: Config, world: World) -> bool:
    """Whether rows are conversations and the tokenizer has no chat template.

    False for a hub id, which is not downloaded yet, and for a model with its own Python code, which
    may set a template.
    """
    folder = Path(config.model.name_or_path)
    if config.data.format == "text" or config.data.template or config.model.trust_remote_code:
        return False
    if not (folder / "tokenizer_config.json").is_file():
        return False  # there is no tokenizer: the loader reports that
    separate_files = (folder / "chat_template.jinja", folder / "additional_chat_templates")
    settings = read_object_or_empty(folder / "tokenizer_config.json")
    return not settings.get("chat_template") and not any(path.exists() for path in separate_files)


def _missing_head(config: Config) -> str | None:
    """The output head that config.json asks for and no file contains. Not for a model with its own
    Python code, which may tie it."""
    if config.model.trust_remote_code:
        return None
    return find_missing_head(Path(config.model.name_or_path))


def _separate_head(config: Config) -> tuple[str, str] | None:
    """(head, embedding) that config.json ties although they differ in the files."""
    return find_separate_head(Path(config.model.name_or_path))


def _config_file(config: Config) -> str:
    return f"{config.model.name_or_path}/{CONFIG}"


def _bad_tokens(config: Config) -> list[str]:
    """The new tokens that are no text, blank or repeated."""
    tokens = config.model.add_tokens
    return [t for at, t in enumerate(tokens) if not _is_text(t) or t in tokens[:at]]


def _is_text(token: object) -> bool:
    """The schema also accepts a list in the list."""
    return isinstance(token, str) and bool(token.strip())


def _good_tokens(config: Config) -> list[str]:
    tokens = config.model.add_tokens
    return list(dict.fromkeys(token for token in tokens if _is_text(token)))


def _typed(tokens: list[str]) -> str:
    """The override of new tokens as it is typed, without the shell's quotes."""
    return f"model.add_tokens={json.dumps(tokens, ensure_ascii=False, separators=(',', ':'))}"


def _adapter_without_vocabulary(config: Config) -> str | None:
    """The existing adapter, if it does not train the rows of new tokens."""
    method = config.method
    if not (config.model.add_tokens and isinstance(method, LoraConfig) and method.adapter):
        return None
    modules = adapter_settings(method.adapter).get("modules_to_save") or []
    return None if any(is_embedding(f".{name}.weight") for name in modules) else method.adapter


def _uses_flash_attention(config: Config) -> bool:
    return config.model.attention == FLASH_ATTENTION


# A safetensors file with an embedding and another head, for the example.
SEPARATE_HEAD = "\0\1" + "\0" * 6 + (
    '{"embed_tokens.weight": {"dtype": "I8", "shape": [1, 1], "data_offsets": [0, 1]}, '
    '"lm_head.weight": {"dtype": "I8", "shape": [1, 1], "data_offsets": [1, 2]}}'
).ljust(256) + "eh"  # fmt: skip

MODEL_RULES: tuple[Rule, ...] = (
    Rule(
        "model-is-there",
        "model.name_or_path is a model folder or a hub id",
        _is_missing,
        lambda c, w: (
            f"model.name_or_path={c.model.name_or_path} is not a model folder (no config.json)"
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
        "model.revision needs a hub id",
        lambda c, w: c.model.revision is not None and not is_hub_id(c.model.name_or_path),
        lambda c, w: (
            f"model.revision={c.model.revision} selects a commit of a hub id, but "
            f"model.name_or_path={c.model.name_or_path} is a folder"
        ),
        lambda c, w: "model.revision=null, or model.name_or_path=OWNER/NAME",
        Example("model.revision=main"),
    ),
    Rule(
        "model-has-safetensors",
        "the model folder contains safetensors files",
        _has_no_safetensors,
        lambda c, w: f"model.name_or_path={c.model.name_or_path} contains no *.safetensors",
        lambda c, w: (
            "convert it once: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        ),
        Example("model.name_or_path=./model", files={"model/config.json": "{}"}),
    ),
    Rule(
        "model-is-not-quantized",
        "the model's weights are not quantized",
        lambda c, w: _quantization(c) is not None,
        lambda c, w: (
            f"model.name_or_path={c.model.name_or_path} is quantized ({_quantization(c)}): its "
            "weights cannot be trained or merged"
        ),
        lambda c, w: f"model.name_or_path=FOLDER of the 16-bit original{_dequantization(c)}",
        Example(
            "model.name_or_path=./model",
            files={
                "model/config.json": '{"quantization_config": {"quant_method": "fp8"}}',
                "model/model.safetensors": "",
            },
        ),
    ),
    Rule(
        "head-is-there",
        "the files contain the output head, if config.json does not tie it to the embedding",
        lambda c, w: _missing_head(c) is not None,
        lambda c, w: (
            f"model.name_or_path={c.model.name_or_path} contains no {_missing_head(c)}, but its "
            "config.json does not tie the output head to the embedding, so the head would be random"
        ),
        lambda c, w: (
            f"set tie_word_embeddings to true in {_config_file(c)} if the head is the embedding, "
            f"or add the file with {_missing_head(c)}"
        ),
        Example(
            "model.name_or_path=./model",
            files={
                "model/config.json": '{"tie_word_embeddings": false}',
                "model/model.safetensors": "",
                "model/model.safetensors.index.json": (
                    '{"weight_map": {"model.embed_tokens.weight": "model.safetensors"}}'
                ),
            },
        ),
    ),
    Rule(
        "tied-head-is-the-embedding",
        "the files contain no output head of its own, if config.json ties it to the embedding",
        lambda c, w: _separate_head(c) is not None,
        lambda c, w: (
            "model.name_or_path={}: {} differs from {}, but its config.json ties them, so one of "
            "them would be lost".format(c.model.name_or_path, *(_separate_head(c) or ("", "")))
        ),
        lambda c, w: (
            f"set tie_word_embeddings to false in {_config_file(c)} to train both, or remove "
            f"{(_separate_head(c) or ('',))[0]} from the files"
        ),
        Example(
            "model.name_or_path=./model",
            files={
                "model/config.json": '{"tie_word_embeddings": true}',
                "model/model.safetensors": SEPARATE_HEAD,
            },
        ),
    ),
    Rule(
        "new-tokens-are-texts",
        "every token of model.add_tokens is a text, and is there once",
        lambda c, w: bool(_bad_tokens(c)),
        lambda c, w: (
            f"{_typed(c.model.add_tokens)}: {json.dumps(_bad_tokens(c)[0], ensure_ascii=False)} is "
            f"{'there twice' if _is_text(_bad_tokens(c)[0]) else 'no text'}"
        ),
        lambda c, w: _typed(_good_tokens(c)),
        Example('\'model.add_tokens=["<|tool|>","<|tool|>"]\''),
    ),
    Rule(
        "new-tokens-are-trained",
        "model.add_tokens is used with method.adapter only if that adapter trains the embedding",
        lambda c, w: _adapter_without_vocabulary(c) is not None,
        lambda c, w: (
            f"{_typed(c.model.add_tokens)}: method.adapter={_adapter_without_vocabulary(c)} does "
            "not contain the embedding (modules_to_save), so the new rows would not be trained"
        ),
        lambda c, w: "method.adapter=null, or model.add_tokens=[]",
        Example(
            "'model.add_tokens=[\"<|tool|>\"]' method.adapter=adapter",
            files={
                "adapter/adapter_config.json": '{"peft_type": "LORA", "r": 8}',
                "adapter/adapter_model.safetensors": "",
            },
        ),
    ),
    Rule(
        "chat-has-a-template",
        "the tokenizer has a chat template if rows are conversations",
        _has_no_chat_template,
        lambda c, w: (
            f"the tokenizer of model.name_or_path={c.model.name_or_path} has no chat template, but "
            f"data.format={c.data.format} turns every row into a conversation"
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
        f"model.attention={FLASH_ATTENTION} needs a GPU",
        lambda c, w: _uses_flash_attention(c) and w.gpus == 0,
        lambda c, w: f"model.attention={FLASH_ATTENTION} needs a GPU, and no GPU is visible",
        lambda c, w: "model.attention=sdpa",
        Example(f"model.attention={FLASH_ATTENTION} precision=bf16", Machine(gpus=0)),
    ),
    Rule(
        "flash-attention-is-installed",
        f"model.attention={FLASH_ATTENTION} needs the package flash-attn",
        lambda c, w: _uses_flash_attention(c) and w.gpus > 0 and not w.machine.flash_attention,
        lambda c, w: f"model.attention={FLASH_ATTENTION}: flash-attn is not installed",
        lambda c, w: "model.attention=sdpa, or pip install flash-attn --no-build-isolation",
        Example(f"model.attention={FLASH_ATTENTION} precision=bf16", Machine(gpus=1)),
    ),
    Rule(
        "flash-attention-needs-16-bits",
        f"model.attention={FLASH_ATTENTION} computes in bf16 or fp16",
        lambda c, w: _uses_flash_attention(c) and c.precision.name == "fp32",
        lambda c, w: (
            f"model.attention={FLASH_ATTENTION} computes in bf16 or fp16, but not in precision=fp32"
        ),
        lambda c, w: "precision=bf16, or model.attention=sdpa",
        Example(
            f"model.attention={FLASH_ATTENTION} precision=fp32",
            Machine(gpus=1, flash_attention=True),
        ),
    ),
)
