"""A model given by path or hub id: its local folder and its small files. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

from launcher.errors import UserError
from launcher.folders.tensor_entries import INDEX, tensor_names

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
# How the names of files begin that trainers write beside weights, in the same formats.
NOT_MODELS = (
    *("adapter_model", "training_args", "optimizer", "scheduler", "random_states", "sampler"),
    *("dl_state_dict", "scaler"),
)
MAX_SHARD_BYTES = 5 * 10**9  # of a file with weights, unless another size is asked for
# The files of a tokenizer, of any class.
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
)
# The files of a hub repository that are downloaded.
HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
# Also, if it has no safetensors.
TORCH_WEIGHTS = ("pytorch_model*.bin", "adapter_model.bin")


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
    from huggingface_hub import snapshot_download  # not needed for a local folder

    allowed = [*patterns, *["*.py"] * include_code]
    try:
        folder = Path(snapshot_download(name_or_path, revision=revision, allow_patterns=allowed))
        if "*.safetensors" in patterns and not any(folder.glob("*.safetensors")):
            allowed += TORCH_WEIGHTS
            snapshot_download(name_or_path, revision=revision, allow_patterns=allowed)
        return folder
    except (
        Exception
    ) as error:  # the hub client raises a dozen types, all with the same meaning here
        raise UserError(
            f"model.name_or_path={name_or_path} could not be downloaded from the hub: {error}. "
            "Use a local folder instead"
        ) from error


def is_weights_file(name: str) -> bool:
    """Whether a file with this name contains weights of a model, as safetensors or a torch file."""
    return name.endswith((".safetensors", ".bin")) and not name.startswith(NOT_MODELS)


def single_weights_file(folder: Path) -> Path:
    """The weights of a folder without an index: `model.safetensors`, or its only file.

    Raises UserError if there are several.
    """
    files = sorted(folder.glob("*.safetensors"))
    default = folder / WEIGHTS
    if default in files or len(files) == 1:
        return default if default in files else files[0]
    raise UserError(
        f"{folder} contains {len(files)} safetensors files and no {INDEX}: it is unclear which of "
        "them are the model"
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
