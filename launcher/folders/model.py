"""A model given by path or hub id: its local folder and its small files. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

from launcher.errors import UserError
from launcher.folders.file_names import PART, TORCH_MODELS, WEIGHT_FILES, parts_of_one_model
from launcher.folders.tensor_entries import INDEX, tensor_names

CONFIG = "config.json"
MODELOPT = "hf_quant_config.json"  # how ModelOpt quantized the weights, beside config.json
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
MAX_SHARD_BYTES = 5 * 10**9  # of a file with weights, unless another size is asked for
# The files of a tokenizer, of any class.
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "*_vocab.*",
    "vocab-*.json",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "bpe.codes",
    "tekken.json",
)
TEMPLATES = "additional_chat_templates"  # a folder of a tokenizer, next to those files
# The files of a hub repository that are downloaded.
HUB_PATTERNS = (
    *("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.spm", "*.tiktoken"),
    "bpe.codes",
)


def is_hub_id(name_or_path: str) -> bool:
    """Whether it is `owner/name` and not a local folder; transformers makes the same choice."""
    return bool(re.fullmatch(r"[\w-]+/[\w.-]+", name_or_path)) and not Path(name_or_path).exists()


def model_folder(
    name_or_path: str,
    revision: str | None,
    include_code: bool = False,
    patterns: tuple[str, ...] = HUB_PATTERNS,
) -> Path:
    """The local folder of a model. A hub id is downloaded once; file locks make this safe.

    Args:
        include_code: Also download the model's own Python files.
        patterns: The other files to download.

    Raises UserError if the download fails.
    """
    if not is_hub_id(name_or_path):
        return Path(name_or_path)
    allowed = [*patterns, *["*.py"] * include_code]
    named = f"model.name_or_path={name_or_path}"
    folder = _download(name_or_path, revision, allowed, None, named)
    if "*.safetensors" in patterns and not any(folder.glob("*.safetensors")):
        return _download(name_or_path, revision, [*allowed, *TORCH_MODELS], None, named)
    return folder


def whole_model_folder(name_or_path: str, revision: str | None) -> Path:
    """As `model_folder`, with all files but weights, and of these those of the model: in
    safetensors, or else in torch files."""
    if not is_hub_id(name_or_path):
        return Path(name_or_path)
    named = f"the base model {name_or_path}"
    others = [pattern for pattern in WEIGHT_FILES if pattern != "*.safetensors"]
    ignored = [*others, "consolidated*.safetensors"]
    folder = _download(name_or_path, revision, None, ignored, named)
    if any(folder.glob("*.safetensors")):
        return folder
    return _download(name_or_path, revision, [*TORCH_MODELS], None, named)


def _download(
    name_or_path: str,
    revision: str | None,
    allowed: list[str] | None,
    ignored: list[str] | None,
    named: str,
) -> Path:
    """The snapshot of a hub id, with the files of these patterns.

    `named`: the setting, for the message. Raises UserError.
    """
    from huggingface_hub import snapshot_download  # not needed for a local folder

    try:
        snapshot = snapshot_download(
            name_or_path, revision=revision, allow_patterns=allowed, ignore_patterns=ignored
        )
        return Path(snapshot)
    except (
        Exception
    ) as error:  # the hub client raises a dozen types, all with the same meaning here
        raise UserError(
            f"{named} could not be downloaded from the hub: {error} → a local folder in its place"
        ) from error


def single_weights_file(folder: Path) -> Path:
    """The weights of a folder without an index: `model.safetensors`, or its only file.

    Raises UserError if there is none, or if there are several.
    """
    files = sorted(folder.glob("*.safetensors"))
    default = folder / WEIGHTS
    if not files:
        raise UserError(
            f"{folder} contains no weights in safetensors → if it has them in torch files (.bin), "
            f"shardway consolidate {folder} --output DIR writes them in safetensors"
        )
    if default in files or len(files) == 1:
        file = default if default in files else files[0]
        if (part := PART.fullmatch(file.name)) and int(part[3]) > 1:
            raise UserError(
                f"{file} is one of {int(part[3])} files, and the others are missing, with {INDEX} "
                "→ the same download or copy once more"
            )
        return file
    if parts_of_one_model(files):
        raise UserError(
            f"{folder} contains {len(files)} files of a model and no {INDEX}, without which no "
            f"library loads them → shardway consolidate {folder} --output DIR writes it"
        )
    raise UserError(
        f"{folder} contains {len(files)} safetensors files and no {INDEX}: it is unclear which of "
        "them are the model → SOURCE with the files of one model alone"
    )


def missing_modules(folder: Path, modules: list[str]) -> list[str]:
    """Those of `modules` that occur in no tensor name.

    Empty if the tensor names are unknown, and for models with experts, whose modules differ in
    memory and on disk. `lm_head` is never missing: a tied head is not stored on disk.
    """
    names = tensor_names(folder)
    if not names or any(".experts." in name for name in names):
        return []
    dotted = [f".{name}" for name in names]
    return [
        module
        for module in modules
        if module != "lm_head" and not any(f".{module}." in name for name in dotted)
    ]
