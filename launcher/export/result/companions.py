"""The files beside the weights that a server needs: config, tokenizer, chat template, index."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from launcher.export.plan import Plan
from launcher.export.source import ADAPTER_CONFIG, Source

MANIFEST = "consolidation_manifest.json"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
# A tokenizer that training kept is better than the base's: it may have more tokens.
TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*processor_config.json",
)
LEFT_BEHIND = (  # weights, and what trainers keep for themselves
    *(
        "*.safetensors",
        "*.bin",
        "*.pt",
        "*.pth",
        "*.gguf",
        "*.h5",
        "*.msgpack",
        "*.onnx",
        "*.distcp",
    ),
    *("*.index.json", ".*", "latest", "latest_universal", "zero_to_*.py", "trainer_state.json"),
    *("trainer.json", "manifest.json", MANIFEST, ADAPTER_CONFIG, CONFIG, "config.yaml"),
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
    """Name → file. All that is no weight comes from the model's folder, tokenizers from the first
    folder that has one."""
    home = source.base or source.companions[0]
    found: dict[str, Path] = {}
    if not tokenizer_only:
        found |= {path.name: path for path in home.iterdir() if _travels(path, LEFT_BEHIND)}
    for folder in reversed(source.companions):
        if folder != home and (folder / "tokenizer_config.json").is_file():
            found |= {path.name: path for path in folder.iterdir() if _is(path, TOKENIZER)}
    return found


def _travels(path: Path, left_behind: tuple[str, ...]) -> bool:
    return path.is_file() and not _is(path, left_behind)


def _is(path: Path, patterns: tuple[str, ...]) -> bool:
    return path.is_file() and any(fnmatch(path.name, pattern) for pattern in patterns)


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
