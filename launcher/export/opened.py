"""Opens the small files of an exported folder as its users will: with transformers and PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from launcher.errors import UserError, one_line
from launcher.folders.adapter import SETTINGS as ADAPTER
from launcher.folders.json_file import read_object
from launcher.folders.model import CONFIG, GENERATION_CONFIG
from launcher.io.tokenizer_files import SETTINGS as TOKENIZER
from launcher.io.tokenizer_files import has_vocabulary

LABELS = {TOKENIZER: "the tokenizer"}  # what consists of several files
OWN_CODE = "auto_map"  # in a config: classes that are in Python files of the folder


def open_small_files(folder: Path) -> tuple[str, ...]:
    """Notes: what was opened, and what needs the folder's own code, or a library, and was not.
    With a model_type that transformers does not have, config and tokenizer are not opened.

    Raises UserError for a file that does not load, or a Python file that is named and missing.
    """
    opened, notes = [], []
    for name, opener in _openers(folder).items():
        label, classes = LABELS.get(name, name), _own_classes(folder / name)
        _check_code(folder, name, classes)
        try:
            opener(folder)
            opened.append(label)
        except Exception as error:  # each class raises its own errors
            if not classes and not isinstance(error, ImportError):
                raise UserError(
                    f"{folder}: {label} does not load in {_library()}: {one_line(error)} → the "
                    "files as the base has them"
                ) from error
            reason = f"it needs code of {folder}" if classes else one_line(error)
            notes.append(f"{label} was not opened: {reason}")
    return (*notes, f"{', '.join(opened)} load") if opened else tuple(notes)


def _openers(folder: Path) -> dict[str, Callable[[Path], Any]]:
    """Name of a small file that is there → what opens it, by its folder."""
    import transformers

    own = {"trust_remote_code": False}
    openers: dict[str, Callable[[Path], Any]] = {
        CONFIG: partial(transformers.AutoConfig.from_pretrained, **own),
        ADAPTER: _open_adapter_config,
        TOKENIZER: partial(transformers.AutoTokenizer.from_pretrained, **own),
        GENERATION_CONFIG: transformers.GenerationConfig.from_pretrained,
    }
    present = {name for name in openers if (folder / name).is_file()}
    present |= {TOKENIZER} if has_vocabulary(folder) else set()
    if CONFIG in present and not _is_known(folder / CONFIG):
        present -= {CONFIG, TOKENIZER}
    return {name: opener for name, opener in openers.items() if name in present}


def _library() -> str:
    import transformers

    return f"transformers {transformers.__version__}"


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
