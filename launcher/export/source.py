"""What a SOURCE is: a run, a checkpoint, an adapter or a model folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import manifest
from launcher.checkpoint import layout
from launcher.errors import UserError
from launcher.export.safetensors_file import StoredTensor, read_header
from launcher.model.folder import model_folder, the_safetensors_file
from launcher.run_dir import RunDir


@dataclass(frozen=True)
class Source:
    """What is to be consolidated. At most one of `adapter` and `shards` is set."""

    base: Path  # folder with config, tokenizer and the weights that training began with
    adapter: Path | None = None  # PEFT adapter folder
    shards: Path | None = None  # DCP folder of a whole model


def find_source(path: Path, base: str | None, adapter: Path | None) -> Source:
    """Recognise `path` by what is in it; `base` and `adapter` override what it says.

    Raises UserError when it is nothing known, or is not whole.
    """
    if not path.is_dir():
        raise UserError(f"SOURCE {path} is no folder")
    is_model = (path / "config.json").is_file() and not (path / "adapter_config.json").is_file()
    if adapter is not None and not is_model:
        raise UserError(f"--adapter {adapter} goes with a model folder, and SOURCE {path} is none")
    if base is not None and is_model:
        raise UserError(f"SOURCE {path} is a model itself; leave --base {base} out")
    run = RunDir(path)
    if run.config.is_file() and run.checkpoints.is_dir():
        path = layout.newest(run.checkpoints).path
    if (path / layout.MANIFEST).is_file():
        saved = manifest.check(path / layout.MANIFEST)
        if not {"step", "base"} <= saved.keys():
            raise UserError(f"{path / layout.MANIFEST} is no checkpoint's manifest")
        checkpoint = layout.Checkpoint(path)
        folder = _base(base, saved["base"]["name_or_path"], saved["base"]["revision"])
        return Source(folder, checkpoint.adapter, checkpoint.model)
    if (path / "adapter_config.json").is_file():
        named = read_json(path / "adapter_config.json")
        return Source(
            _base(base, named.get("base_model_name_or_path"), named.get("revision")), adapter=path
        )
    if is_model:
        return Source(path, adapter=adapter)
    raise UserError(
        f"SOURCE {path} is neither a run (config.yaml, checkpoints/), a checkpoint "
        f"({layout.MANIFEST}), an adapter (adapter_config.json) nor a model (config.json)"
    )


def base_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Name → tensor over all files that the model folder's index lists, or its one file."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return read_header(the_safetensors_file(folder))
    weight_map: dict[str, str] = read_json(index).get("weight_map") or {}
    if not weight_map:
        raise UserError(f"{index} lists no tensors")
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing; {index.name} lists it")
        found = read_header(folder / name)
        tensors |= {key: each for key, each in found.items() if weight_map.get(key) == name}
    if lost := sorted(weight_map.keys() - tensors.keys()):
        raise UserError(f"{index} lists {lost[:3]} ({len(lost)} tensors) that no file holds")
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError when it is no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings")
    return content


def _base(given: str | None, recorded: str | None, revision: str | None) -> Path:
    name = given or recorded
    if not name:
        raise UserError("the adapter does not say which model it belongs to; add --base FOLDER")
    folder = model_folder(name, None if given else revision)
    if not (folder / "config.json").is_file():
        raise UserError(f"the base model {name} is not there; say where it is with --base FOLDER")
    return folder
