"""The files beside the weights that a server needs: config, tokenizer, chat template, index."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from launcher.export.plan import Plan
from launcher.export.source import ADAPTER_CONFIG, Source, tokenizer_folder

MANIFEST = "consolidation_manifest.json"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
)
PROCESSOR = ("*processor_config.json",)
# Of the model's own folder: what describes it. Weights, and what trainers keep for themselves, not.
TRAVELS = (
    *TOKENIZER,
    *PROCESSOR,
    "*.json",
    "*.jinja",
    "*.txt",
    "*.py",
    "*.tiktoken",
    "*.md",
    "LICENSE*",
    "NOTICE*",
)
STAYS = (
    *("*.index.json", ".*", "zero_to_*.py", "trainer_state.json", "*_results.json", "trainer.json"),
    *("manifest.json", "ds_config*.json", "*deepspeed*.json", MANIFEST, ADAPTER_CONFIG, CONFIG),
)


def write_companions(plan: Plan, folder: Path) -> None:
    """Write them into `folder`. The same names are overwritten: a resumed export does so again."""
    for name, origin in sorted(companions(plan.source, plan.options.adapter_only).items()):
        shutil.copyfile(origin, folder / name)
    config = ADAPTER_CONFIG if plan.options.adapter_only else CONFIG
    _write_json(folder / config, plan.config, sort=False)
    for name, text in plan.extras.items():
        (folder / name).write_text(text, encoding="utf-8")
    if len(plan.shards) > 1:
        _write_json(folder / INDEX, _index(plan), sort=True)


def companions(source: Source, tokenizer_only: bool) -> dict[str, Path]:
    """Name → file. What describes the model comes from its folder, the tokenizer whole from the
    first folder that has one."""
    found: dict[str, Path] = {}
    home = None
    if not tokenizer_only:
        home = source.base or next(f for f in source.companions if (f / CONFIG).is_file())
        found |= {path.name: path for path in _files(home, TRAVELS) if not _is(path, STAYS)}
    folder = tokenizer_folder(source)
    if folder is not None and folder != home:
        kept = {name: path for name, path in found.items() if not _is(path, TOKENIZER)}
        found = kept | {path.name: path for path in _files(folder, (*TOKENIZER, *PROCESSOR))}
    return found


def _files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file() and _is(path, patterns)]


def _is(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in patterns)


def _index(plan: Plan) -> dict[str, Any]:
    """The index that transformers, vLLM and SGLang read; one file needs none."""
    parameters = sum(tensor.nbytes // tensor.dtype.itemsize for tensor in plan.tensors)
    weight_map = {
        tensor.name: plan.file_name(number)
        for number, shard in enumerate(plan.shards)
        for tensor in shard
    }
    return {
        "metadata": {"total_parameters": parameters, "total_size": plan.nbytes},
        "weight_map": weight_map,
    }


def _write_json(path: Path, content: Any, sort: bool) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=sort) + "\n", encoding="utf-8")
