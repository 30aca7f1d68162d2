"""The files beside the weights that a server needs: config, tokenizer, chat template, index."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from launcher.export.copied_files import find_copied_files
from launcher.export.plan import Plan
from launcher.export.source_folders import model_home
from launcher.folders.adapter import SETTINGS
from launcher.folders.json_file import dump_like, read_object
from launcher.folders.model import CONFIG, INDEX


def write_extra_files(plan: Plan, folder: Path) -> None:
    """Write the extra files to `folder`. Existing files are overwritten: a resumed export writes
    them again."""
    for name, origin in sorted(find_copied_files(plan.source, plan.options).items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(origin, folder / name)
    if plan.options.adapter_only:
        _write_json(folder / SETTINGS, plan.config, sort=False)
    else:
        _write_config(plan, folder / CONFIG)
    for name, content in plan.generated.items():
        (folder / name).write_bytes(content)
    if len(plan.shards) > 1:
        _write_json(folder / INDEX, _index(plan), sort=True)


def _index(plan: Plan) -> dict[str, Any]:
    """The index that transformers, vLLM and SGLang read. A single file needs none."""
    parameters = sum(tensor.nbytes // tensor.dtype.itemsize for tensor in plan.tensors)
    weight_map = {tensor.name: name for name, tensors in plan.files.items() for tensor in tensors}
    return {
        "metadata": {"total_parameters": parameters, "total_size": plan.nbytes},
        "weight_map": weight_map,
    }


def _write_config(plan: Plan, path: Path) -> None:
    """The model's config.json: byte for byte, or in its form if something in it has changed."""
    original = model_home(plan.source) / CONFIG
    if read_object(original) == plan.config:
        shutil.copyfile(original, path)
    else:
        text = dump_like(plan.config, original.read_text(encoding="utf-8"))
        path.write_text(text, encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any], sort: bool) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=sort) + "\n", encoding="utf-8")
