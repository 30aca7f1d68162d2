"""What is in a file, by its name: weights, in one of many formats, or the state of a trainer. The
only lists of such names. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from launcher.errors import UserError

# Files with weights, by what reads them.
SAFETENSORS = ("*.safetensors",)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
LLAMA_CPP = ("*.gguf", "*.ggml", "*.llamafile")
ONNX = ("*.onnx", "*.onnx_data*", "*.onnx.data")
FLAX_AND_OTHERS = (
    *("*.msgpack", "*.h5", "*.tflite", "*.ot", "*.mlmodel", "*.mlpackage", "*.pte", "*.litertlm"),
)
META = ("consolidated*.pth",)
NEMO = ("*.nemo",)
NUMPY = ("*.npz",)
WEIGHT_FILES = (
    *(*SAFETENSORS, *PICKLES, *LLAMA_CPP, *ONNX, *FLAX_AND_OTHERS, *NEMO, *NUMPY),
    "*.distcp",
)
# Weights of a model in torch files; those of a hub repository are downloaded by these patterns.
TORCH_MODELS = ("pytorch_model*.bin", "*.bin.index.json", "adapter_model.bin")

OF_ADAPTERS = ("adapter_config.json", "adapter_model*")
# What trainers write beside weights, some of it in the same formats.
OF_TRAINERS = (
    *("optimizer*", "scheduler*.pt", "scheduler*.bin", "scaler*.pt", "scaler*.bin"),
    *("sampler*.bin", "dl_state_dict*.bin", "rng_state*", "random_states*", "training_args*"),
    *("trainer_state.json", "trainer.json", "trainer_log.jsonl", "*_results.json"),
    *("latest", "latest_universal", "zero_to_*.py", "ds_config*.json", "*deepspeed*.json"),
    *("manifest.json", "events.out.tfevents.*", "checkpoint-*", "global_step*"),
    *("runs", "logs", "wandb", "mlruns"),
)
# The files of a sharded checkpoint that is not in safetensors, and folders of them.
SHARDS = (
    *("*.distcp", ".metadata", "__*.metadata", "*_states.pt", "zero", "pytorch_model_fsdp_*"),
    "sharded",
)
ARCHIVES = ("*.zip", "*.tar", "*.tar.*", "*.tgz", "*.7z")
HIDDEN = (".*", "__pycache__")
PART = re.compile(r"(.+)-(\d{5,})-of-(\d{5,})\.(\w+)")  # the name of one of several files


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def parts_of_one_model(files: Sequence[Path]) -> bool:
    """Whether these files are the parts of one model by their names (`model-00001-of-00003.…`).
    Raises UserError if one of them is missing."""
    parts = [match for file in files if (match := PART.fullmatch(file.name))]
    if len(parts) < len(files) or len({(match[1], match[3]) for match in parts}) != 1:
        return False
    count = int(parts[0][3])
    missing = sorted({*range(1, count + 1)} - {int(match[2]) for match in parts})
    if not missing:
        return True
    name = f"{parts[0][1]}-{missing[0]:05d}-of-{count:05d}.{parts[0][4]}"
    raise UserError(
        f"{files[0].parent} lacks {name} ({len(missing)} of {count} files are missing, and the "
        "index that lists them) → the same download or copy once more"
    )


def is_weights_file(name: str) -> bool:
    """Whether a file with this name contains weights of a model, as safetensors or a torch file."""
    return matches(name, (*SAFETENSORS, "*.bin")) and not matches(
        name, (*OF_ADAPTERS, *OF_TRAINERS)
    )
