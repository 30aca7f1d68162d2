"""What a path is that nothing can be exported from, and what to name instead. Imports no torch."""

from __future__ import annotations

import os
import re
from pathlib import Path

from launcher.errors import UserError
from launcher.folders.adapter import SETTINGS as ADAPTER
from launcher.folders.brief import listed
from launcher.folders.file_names import (
    ARCHIVES,
    FLAX_AND_OTHERS,
    LLAMA_CPP,
    META,
    NEMO,
    NUMPY,
    OF_ADAPTERS,
    OF_TRAINERS,
    ONNX,
    PICKLES,
    WEIGHT_FILES,
    matches,
)
from launcher.folders.kind import SHARDED, Kind, kinds_of
from launcher.folders.model import CONFIG, TOKENIZER_FILES, is_hub_id

ACCEPTED = (
    "name a run (config.yaml, checkpoints/), a checkpoint (manifest.json), an adapter "
    "(adapter_config.json), a model (config.json), or a sharded checkpoint of DeepSpeed (latest, "
    "*_model_states.pt) or torch (.metadata)"
)
IN_TORCH = tuple(pattern for pattern in PICKLES if pattern != "*.bin")
# Weights that are not read: names of files → what they are, and what to do.
FORMATS: dict[tuple[str, ...], str] = {
    LLAMA_CPP: (
        "weights for llama.cpp, most of them quantized → the folder in safetensors that they were "
        "converted from"
    ),
    ONNX: "weights for ONNX → those in safetensors",
    FLAX_AND_OTHERS: (
        "weights for Flax, TensorFlow, Rust or a phone → those in safetensors, or the result of "
        "from_pretrained(FOLDER, from_flax=True) or from_tf=True and save_pretrained of "
        "transformers 4"
    ),
    META: (
        "weights as Meta releases them → the same model in the layout of Hugging Face (on the hub "
        "its name often ends in -hf)"
    ),
    NUMPY: "arrays of NumPy or MLX → the model in safetensors",
    NEMO: "an archive of NeMo → the result of its export to Hugging Face",
}
LISTED = 3  # names in a message


def check_folder(path: Path) -> None:
    """Raises UserError if SOURCE `path` is not a folder that can be read."""
    try:
        if path.is_dir():
            next(path.iterdir(), None)
            return
        error = refusal(path)
    except OSError as cause:
        raise UserError(
            f"SOURCE {path} cannot be read: {cause.strerror or cause} → as a user who may read it"
        ) from cause
    raise error


def refusal(path: Path) -> UserError:
    """Why SOURCE `path`, of no known kind, cannot be exported."""
    if path.is_dir():
        return UserError(f"SOURCE {path} {explain(path)}")
    if path.is_symlink():
        return UserError(
            f"SOURCE {path} is a link to {os.readlink(path)}, which does not exist → the folder "
            "itself"
        )
    if path.exists():
        return UserError(f"SOURCE {path} is not a folder: {_explain_file(path)}")
    name = str(path)
    if is_hub_id(name):
        return UserError(
            f"SOURCE {path} does not exist here → if it is a model of the hub, hf download {name} "
            f"--local-dir {path.name}, and name {path.name}"
        )
    parent = next((each for each in path.absolute().parents if each.exists()), Path("/"))
    return UserError(f"SOURCE {path} does not exist; {parent} does → check the rest of the path")


def explain(folder: Path) -> str:
    """What a folder without weights that can be read contains, and what to do: the rest of a
    sentence that begins with its path."""
    files = sorted(path for path in folder.iterdir() if path.name != CONFIG)
    names = [path.name for path in files]
    if not files:
        empty = f"contains a {CONFIG} alone" if (folder / CONFIG).exists() else "is empty"
        return f"{empty} → the folder with the weights, or the download once more"
    if (snapshots := folder / "snapshots").is_dir():
        newest = max(snapshots.iterdir(), key=os.path.getmtime, default=None)
        return f"is a repository in the hub's cache → its snapshot {newest or snapshots}"
    if is_incomplete(folder):
        return "was not downloaded completely → the same download once more continues"
    if (checkpoint := newest_inside(folder)) is not None:
        return f"contains no weights itself, but folders with them → the newest one, {checkpoint}"
    for patterns, sentence in FORMATS.items():
        if found := [name for name in names if matches(name, patterns)]:
            return f"contains {found[0]}: {sentence}"
    return _explain_names(folder, names)


def _explain_names(folder: Path, names: list[str]) -> str:
    """For a folder without checkpoints in it, and without weights of known other formats."""
    states = [name for name in names if matches(name, OF_TRAINERS)]
    others = [name for name in names if name not in states]
    weights = [name for name in others if matches(name, WEIGHT_FILES)]
    if found := [name for name in weights if matches(name, IN_TORCH)]:
        return (
            f"contains {found[0]}, and it is not known what is in a torch file of this name → if "
            f"it is the model's state dict, rename it to pytorch_model.bin, beside the {CONFIG} of "
            "its model, or with --base MODEL"
        )
    if ADAPTER in names:
        return "is an adapter → the model that it was trained on"
    if found := [name for name in weights if matches(name, OF_ADAPTERS)]:
        return f"contains {found[0]} and no {ADAPTER} → the {ADAPTER} of the adapter beside it"
    if weights and not (folder / CONFIG).exists():
        return f"contains {weights[0]} and no {CONFIG} → the {CONFIG} of its model beside it"
    if weights:
        return f"contains {weights[0]}, a format that is not read → the weights in safetensors"
    if found := [name for name in names if matches(name, ARCHIVES)]:
        return f"contains {found[0]}, an archive → unpack it, and name the folder that is in it"
    if states:
        return (
            f"contains the state of a trainer ({listed(states, LISTED)}) and no weights → the "
            "folder with the weights of this step"
        )
    if any(matches(name, TOKENIZER_FILES) for name in names):
        return "contains a tokenizer and no weights → the folder of the model"
    return f"contains nothing that is exported ({listed(names, LISTED)}) → {ACCEPTED}"


def is_incomplete(folder: Path) -> bool:
    """Whether a download into the folder was interrupted."""
    places = (folder, folder / ".cache/huggingface/download")
    return any(any(place.glob("*.incomplete")) for place in places)


def newest_inside(folder: Path) -> Path | None:
    """The subfolder with weights that was written last, by the number in its name: a checkpoint of
    a trainer. None if there is none."""
    parents = [path for path in (folder, folder / "checkpoints") if path.is_dir()]
    inner = [path for parent in parents for path in parent.iterdir() if path.is_dir()]
    found = [path for path in inner if _has_weights(path)]
    return max(found, key=_step_and_time, default=None)


def _has_weights(folder: Path) -> bool:
    try:
        kinds = kinds_of(folder)
        names = [path.name for path in folder.iterdir()]
    except OSError:
        return False
    weights = any(name.endswith((".safetensors", ".bin")) for name in names)
    return bool({*SHARDED, Kind.CHECKPOINT, Kind.RUN} & {*kinds}) or (bool(kinds) and weights)


def _step_and_time(folder: Path) -> tuple[int, float]:
    numbers = re.findall(r"\d+", folder.name)
    return int(numbers[-1]) if numbers else -1, folder.stat().st_mtime


def _explain_file(path: Path) -> str:
    """What a file is that was named as SOURCE: the rest of a sentence."""
    for patterns, sentence in FORMATS.items():
        if matches(path.name, patterns):
            return sentence
    if matches(path.name, ARCHIVES):
        return "an archive → unpack it, and name the folder that is in it"
    if matches(path.name, (*WEIGHT_FILES, "*.json")):
        return f"a file of a model → its folder, {path.absolute().parent}"
    return f"a file → {ACCEPTED}"
