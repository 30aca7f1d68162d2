"""Opens the small files of an exported folder as its users will: with transformers and PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launcher.errors import UserError
from launcher.folders.adapter import SETTINGS as ADAPTER
from launcher.folders.json_file import read_object
from launcher.folders.model import CONFIG, GENERATION_CONFIG
from launcher.io.tokenizer_files import SETTINGS as TOKENIZER
from launcher.io.tokenizer_files import has_vocabulary

LABELS = {TOKENIZER: "the tokenizer"}  # what consists of several files
OWN_CODE = "auto_map"  # in a config: classes that are in Python files of the folder


def open_small_files(folder: Path) -> tuple[str, ...]:
    """Notes: what was opened, and what was not because it needs the folder's own code. With a
    model_type that transformers does not have, config and tokenizer are not opened.

    Raises UserError for a file that does not load, or a Python file that is named and missing.
    """
    import transformers

    openers: dict[str, Callable[[Path], Any]] = {
        CONFIG: transformers.AutoConfig.from_pretrained,
        ADAPTER: _open_adapter_config,
        TOKENIZER: transformers.AutoTokenizer.from_pretrained,
        GENERATION_CONFIG: transformers.GenerationConfig.from_pretrained,
    }
    present = {name for name in openers if (folder / name).is_file()}
    present |= {TOKENIZER} if has_vocabulary(folder) else set()
    if CONFIG in present and not _is_known(folder / CONFIG):
        present -= {CONFIG, TOKENIZER}
    openers = {name: opener for name, opener in openers.items() if name in present}
    code = {name: classes for name in openers if (classes := _own_classes(folder / name))}
    for name, classes in code.items():
        _check_code(folder, name, classes)
    notes = [f"{LABELS.get(name, name)} was not opened: it needs code of {folder}" for name in code]
    opened = [name for name in openers if name not in code]
    for name in opened:
        try:
            openers[name](folder)
        except Exception as error:  # each class raises its own errors
            raise UserError(
                f"{folder}: {LABELS.get(name, name)} does not load in transformers "
                f"{transformers.__version__}: {' '.join(str(error).split())[:300]} → the files as "
                "the base has them"
            ) from error
    listed = ", ".join(LABELS.get(name, name) for name in opened)
    return (*notes, f"{listed} load") if opened else tuple(notes)


def _open_adapter_config(folder: Path) -> Any:
    from peft import PeftConfig

    return PeftConfig.from_pretrained(str(folder))


def _is_known(config: Path) -> bool:
    """Whether transformers has the model type, or the folder itself."""
    import transformers

    content = read_object(config)
    return content.get("model_type") in transformers.CONFIG_MAPPING or OWN_CODE in content


def _own_classes(config: Path) -> dict[str, Any]:
    """The classes of the folder's own code that `config` names."""
    classes = read_object(config).get(OWN_CODE) if config.is_file() else None
    return classes if isinstance(classes, dict) else {}


def _check_code(folder: Path, name: str, classes: dict[str, Any]) -> None:
    for path in _modules(classes):
        if not (folder / path).is_file():
            raise UserError(
                f"{folder / name} names code in {path}, which is missing → {path} of the base"
            )


def _modules(classes: dict[str, Any]) -> Iterator[str]:
    """The Python files of the classes: `module.Class`; `owner/name--module.Class` is on the hub."""
    for entry in classes.values():
        for reference in entry if isinstance(entry, list) else [entry]:
            if isinstance(reference, str) and "--" not in reference:
                yield f"{reference.rpartition('.')[0].replace('.', '/')}.py"
