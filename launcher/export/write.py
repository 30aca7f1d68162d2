"""Write a plan: into a folder aside, checked, then one rename."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from launcher import manifest, versions
from launcher.errors import UserError
from launcher.export.plan import OutputTensor, Plan
from launcher.export.safetensors_file import header, readable, tensor_bytes

MANIFEST = "consolidation_manifest.json"
INDEX = "model.safetensors.index.json"
# Everything else of the base folder travels: config, tokenizer, chat template, its own code.
WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".index.json",
)


def write(plan: Plan, output: Path) -> None:
    """Write the folder `output`. Raises UserError before the first byte when it cannot be."""
    refuse_target(plan, output)
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.partial-"))
    try:
        progress = tqdm(total=plan.nbytes, unit="B", unit_scale=True, desc="writing", disable=None)
        with progress:
            for number, shard in enumerate(plan.shards):
                _write_file(aside / plan.file_name(number), shard, progress)
        _write_index(plan, aside)
        _copy_companions(plan.source.base, aside)
        for path in (aside, *aside.iterdir()):
            readable(path)
        _write_manifest(plan, aside)
        if output.exists():
            output.rmdir()  # empty, or this refuses
        aside.rename(output)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # ours alone: made above under a fresh name
        raise


def refuse_target(plan: Plan, output: Path) -> None:
    """Raises UserError for a target in use and for a disk without room."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} exists and is not empty; nothing is overwritten")
    there = next(folder for folder in output.absolute().parents if folder.exists())
    free = shutil.disk_usage(there).free
    if free < plan.nbytes * 1.01:
        raise UserError(
            f"--output {output} needs {plan.nbytes / 1e9:.1f} GB, {there} has {free / 1e9:.1f} GB"
        )


def _write_file(path: Path, tensors: list[OutputTensor], progress: tqdm[NoReturn]) -> None:
    """One safetensors file, a part of a tensor in memory at a time."""
    with path.open("wb") as file:
        file.write(header([(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]))
        for tensor in tensors:
            written = 0
            for part in tensor.parts():
                data = tensor_bytes(part)
                file.write(data)
                written += len(data)
                progress.update(len(data))
            if written != tensor.nbytes:
                raise RuntimeError(f"{tensor.name}: {written} bytes instead of {tensor.nbytes}")
        file.flush()
        os.fsync(file.fileno())


def _write_index(plan: Plan, folder: Path) -> None:
    """The index that transformers, vLLM and SGLang read; one file needs none."""
    if len(plan.shards) == 1:
        return
    parameters = sum(tensor.nbytes // tensor.dtype.itemsize for tensor in plan.tensors)
    weight_map = {
        tensor.name: plan.file_name(number)
        for number, shard in enumerate(plan.shards)
        for tensor in shard
    }
    index = {
        "metadata": {"total_parameters": parameters, "total_size": plan.nbytes},
        "weight_map": weight_map,
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / INDEX).write_text(text, encoding="utf-8")


def _copy_companions(base: Path, folder: Path) -> None:
    for path in sorted(base.iterdir()):
        if path.is_file() and not path.name.endswith(WEIGHTS) and path.name != MANIFEST:
            shutil.copyfile(path, folder / path.name)


def _write_manifest(plan: Plan, folder: Path) -> None:
    actions: dict[str, int] = {}
    for tensor in plan.tensors:
        actions[tensor.action] = actions.get(tensor.action, 0) + 1
    source = plan.source
    manifest.write(
        folder / MANIFEST,
        {
            "shardway": versions.installed()["shardway"],
            "base": str(source.base),
            "adapter": str(source.adapter) if source.adapter else None,
            "shards": str(source.shards) if source.shards else None,
            "max_shard_bytes": plan.max_shard_bytes,
            "total_size": plan.nbytes,
            "tensors": actions,
        },
    )
