"""Converts between the names of a model's tensors in memory and on disk.

transformers 5 renames, fuses and splits tensors when it loads them (`core_model_loading.py`): a
trainer's checkpoint has the names in memory, while a server loads the names on disk. transformers'
own conversions run here on stand-ins of the tensors, so that no tensor is ever in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from launcher.errors import UserError
from launcher.export.names.lacking import refusal
from launcher.export.names.trace import trace
from launcher.folders.model_config import check_model_config, read_model_config
from launcher.io.model_class import class_of_files, config_of, meta_model
from launcher.io.tensor import Tensor


@dataclass(frozen=True)
class Naming:
    """The two namings of one model class.

    Tensors that the class does not build (a multi-token prediction head, for example) keep their
    names in both directions.
    """

    folder: Path  # of config.json
    model: Any  # on the meta device
    conversions: tuple[Any, ...]  # transformers' WeightTransforms, as applied on loading
    shapes: dict[str, tuple[int, ...]]  # in memory
    resizable: frozenset[str]  # parameters with one row for each token
    optional: frozenset[str]  # never saved, or created on loading
    stored: dict[str, str] = field(default_factory=dict)  # in memory → the base's name on disk

    def to_memory(self, disk: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by their names on disk → tensors by their names in `model.state_dict()`.

        Raises UserError if the tensors on disk do not make up a tensor of the model.
        """
        memory: dict[str, Tensor] = {}
        groups: dict[str, Any] = {}
        for name, renamed, pattern, converter in self.renamed(disk):
            if pattern is None:
                _add_unique(memory, renamed, disk[name])
            else:
                group = groups.setdefault(renamed, deepcopy(converter))
                group.add_tensor(renamed, name, pattern, trace(disk[name]))
        for target, group in groups.items():
            sources = sorted(group.layer_targets[target])
            with self._convert_errors(f"{target} from {_summarize(sources)}"):
                converted = group.convert(target, model=self.model, config=self.model.config)
            for name, tensor in _lazy_tensors(converted):
                _add_unique(memory, name, tensor)
                if self.shapes.get(name, tensor.shape) != tensor.shape:
                    raise UserError(
                        f"{name}: {_summarize(sources)} make up {list(tensor.shape)}, the model of "
                        f"{self.folder} has {list(self.shapes[name])}; is a shard missing?"
                    )
        return memory

    def unbuilt(self, disk: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors on disk that make up none of the model's: no training changes them."""
        renamed = self.renamed(disk)
        return {name: disk[name] for name, memory, *_ in renamed if memory not in self.shapes}

    def to_disk(self, memory: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by their names in memory → tensors by the base's names, or `save_pretrained`'s.

        Raises UserError if a tensor is missing, or has a shape that the model does not give it.
        """
        from transformers.core_model_loading import revert_weight_conversion

        self._check_memory(memory)
        apart = self.shapes.keys() - self.stored.keys()
        known = {name: trace(memory[name]) for name in memory if name in apart}
        disk: dict[str, Tensor] = {}
        with self._convert_errors("the tensors of the checkpoint"):
            converted = revert_weight_conversion(self.model, known)
        for name, tensor in _lazy_tensors(converted):
            _add_unique(disk, name, tensor)
        for name, tensor in memory.items():
            if name not in known:
                _add_unique(disk, self.stored.get(name, name), tensor)
        return disk

    def renamed(self, disk: Iterable[str]) -> Iterator[tuple[str, str, str | None, Any]]:
        """(name on disk, name in memory, pattern, converter) for each tensor. Pattern and converter
        are None if the tensor is only renamed.

        These are the rules of transformers' `convert_and_load_state_dict_in_model`.
        """
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        conversions = deepcopy(self.conversions)  # some remember the names that they were given
        renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in conversions if isinstance(c, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        model = self.model.base_model_prefix, self.shapes
        for name in sorted(disk, key=dot_natural_key):
            renamed, pattern = rename_source_key(name, renamings, converters, *model)
            if renamed not in self.shapes and name in self.shapes:
                renamed, pattern = rename_source_key(name, [], [], *model)
            if renamed not in self.shapes:
                renamed, pattern = name, None
            yield name, renamed, pattern, None if pattern is None else by_pattern[pattern]

    def _check_memory(self, memory: dict[str, Tensor]) -> None:
        tied = self.model.all_tied_weights_keys  # alias → the name that is saved
        present = {tied.get(name, name) for name in memory} | self.optional
        if missing := [name for name in self.shapes if tied.get(name, name) not in present]:
            raise refusal(self.folder, type(self.model).__name__, missing, memory, self.shapes)
        for name, shape in self.shapes.items():
            actual = memory[name].shape if name in memory else shape
            if actual != shape and not (name in self.resizable and actual[1:] == shape[1:]):
                raise UserError(
                    f"{name} has the shape {list(actual)}, but in {type(self.model).__name__} of "
                    f"{self.folder} it has {list(shape)}; use the config it was trained with"
                )

    @contextmanager
    def _convert_errors(self, description: str) -> Iterator[None]:
        """Turn the errors of transformers' conversions into UserError."""
        try:
            with torch.no_grad():
                yield
        except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
            operations = {
                type(operation).__name__
                for conversion in self.conversions
                for operation in getattr(conversion, "operations", ())
            }
            listed = ", ".join(sorted(operations)) or "renaming"
            raise UserError(
                f"{description} cannot be converted as transformers does for "
                f"{type(self.model).__name__} ({listed}): {error or type(error).__name__}"
            ) from error


def find_naming(
    config_folder: Path, trust_remote_code: bool = False, names: Iterable[str] = ()
) -> Naming:
    """The namings of the model whose `config.json` is in the folder.

    `names`: the base model's tensors on disk. If a class can read several layouts, only the
    conversions that these names need are reverted, as `save_pretrained` does after
    `from_pretrained`. Without names, the result is that for a model created in memory. Raises
    UserError if transformers does not have the class.
    """
    naming = _naming(config_folder, _build_from_folder(config_folder, trust_remote_code))
    if not names:
        return naming
    naming.model._weight_conversions = _used_conversions(naming.conversions, names)
    renamed = naming.renamed(names)
    stored = {memory: disk for disk, memory, converter, _ in renamed if converter is None}
    return replace(naming, stored=stored)


def naming_of_config(folder: Path, config: dict[str, Any]) -> Naming:
    """The namings of the model that the contents of a `config.json` describe. `folder`: for
    messages. Raises UserError if transformers does not have the class."""
    return _naming(folder, build_on_meta(config))


def _naming(folder: Path, model: Any) -> Naming:
    from transformers.conversion_mapping import get_model_conversion_mapping

    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return Naming(
        folder,
        model,
        tuple(get_model_conversion_mapping(model)),
        shapes,
        frozenset(_resizable(model)),
        frozenset(_optional(model, shapes)),
    )


def build_on_meta(config: dict[str, Any]) -> Any:
    """The model that the contents of a `config.json` describe, without data.

    Raises UserError if transformers does not have the class.
    """
    import transformers

    check_model_config(Path("config.json"), config)
    model_type = config.get("model_type", "null")
    if model_type not in transformers.CONFIG_MAPPING:
        raise UserError(
            f"config.json: model_type is {model_type}, which transformers "
            f"{transformers.__version__} does not have; trust the folder's own code if it has any"
        )
    try:
        return _build(config_of(config))
    except UserError:
        raise
    except Exception as error:  # each class checks its values in its own way
        raise UserError(
            f"config.json does not describe a model of type {model_type}: {error!s:.300}"
        ) from error


def _build_from_folder(folder: Path, trust_remote_code: bool) -> Any:
    import transformers

    config_file = folder / "config.json"
    if not config_file.is_file():
        raise UserError(f"{folder} has no config.json; name the folder of the base model")
    values = read_model_config(config_file)
    remote = values.get("auto_map", {}) if trust_remote_code else {}
    if "AutoConfig" not in remote:
        return build_on_meta(values)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    endings = tuple(f".{name}" for name in values.get("architectures") or ())
    builder = next((name for name, path in remote.items() if path.endswith(endings)), "AutoModel")
    with torch.device("meta"):
        return getattr(transformers, builder).from_config(config, trust_remote_code=True)


def _build(config: Any) -> Any:
    if (model_class := class_of_files(config)) is None:
        import transformers

        raise UserError(
            f"config.json: architectures names {(config.architectures or ['null'])[0]}, which "
            f"transformers {transformers.__version__} does not have; trust the folder's own code "
            "if it has any"
        )
    return meta_model(model_class, config)


def _used_conversions(conversions: tuple[Any, ...], names: Iterable[str]) -> list[Any]:
    """The conversions that change at least one of the names."""
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    candidates = deepcopy(conversions)
    renamings = [c for c in candidates if isinstance(c, WeightRenaming)]
    converters = [c for c in candidates if isinstance(c, WeightConverter)]
    for name in sorted(names, key=dot_natural_key):
        rename_source_key(name, renamings, converters)
    return [conversion for conversion in candidates if conversion.was_used()]


def _resizable(model: Any) -> Iterator[str]:
    """The parameters of the input and output embeddings."""
    embeddings = set()
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        with suppress(NotImplementedError):  # a model without tokens
            embeddings.add(get())
    for path, module in model.named_modules(remove_duplicate=False):
        if module in embeddings:
            yield from (f"{path}.{name}" for name, _ in module.named_parameters(recurse=False))


def _optional(model: Any, shapes: Iterable[str]) -> Iterator[str]:
    yield from model._keys_to_ignore_on_save or ()
    patterns = [re.compile(key) for key in model._keys_to_ignore_on_load_missing or ()]
    yield from (name for name in shapes if any(pattern.search(name) for pattern in patterns))


def _lazy_tensors(converted: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) from the stand-ins that a conversion returned."""
    for name, value in converted.items():
        tensor: Tensor = (value[0] if isinstance(value, list) else value).lazy
        yield name, tensor.renamed(name)


def _add_unique(tensors: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    if name in tensors:
        raise UserError(
            f"{tensor.name} and another tensor are both {name} once renamed; delete one of them"
        )
    tensors[name] = tensor.renamed(name)


def _summarize(names: list[str]) -> str:
    """'a', or 'a and 3 more'."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
