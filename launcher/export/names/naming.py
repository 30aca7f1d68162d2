"""Names that a model's tensors have in memory, and on disk.

transformers 5 renames, fuses and splits tensors as it loads them (`core_model_loading.py`): what a
trainer checkpoints has the names in memory, what a server loads those on disk. transformers' own
conversions run here on stand-ins of the tensors, so that none of them is ever in memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launcher.errors import UserError
from launcher.export.names.traced import traced
from launcher.export.tensor import Tensor


@dataclass(frozen=True)
class Naming:
    """The two namings of one model class. Tensors that the class does not build (a multi-token
    prediction head, say) keep their own names both ways."""

    folder: Path  # of config.json
    model: Any  # on the meta device
    conversions: tuple[Any, ...]  # transformers' WeightTransforms, as applied on loading
    shapes: dict[str, tuple[int, ...]]  # in memory
    resizable: frozenset[str]  # have a row for each token
    optional: frozenset[str]  # never saved, or made anew on loading

    def to_memory(self, disk: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under their names on disk → as `model.state_dict()` has them. Raises UserError
        when what is on disk does not make up a tensor of the model."""
        found: dict[str, Tensor] = {}
        groups: dict[str, Any] = {}
        for name, renamed, pattern, converter in self._renamed(disk):
            if pattern is None:
                _add(found, renamed, disk[name])
            else:
                group = groups.setdefault(renamed, deepcopy(converter))
                group.add_tensor(renamed, name, pattern, traced(disk[name]))
        for first, group in groups.items():
            sources = sorted(group.layer_targets[first])
            with self._converting(f"{first} from {_few(sources)}"):
                made = group.convert(first, model=self.model, config=self.model.config)
            for name, tensor in _lazy(made):
                _add(found, name, tensor)
                if self.shapes.get(name, tensor.shape) != tensor.shape:
                    raise UserError(
                        f"{name}: {_few(sources)} make up {list(tensor.shape)}, the model of "
                        f"{self.folder} has {list(self.shapes[name])}; is a shard missing?"
                    )
        return found

    def to_disk(self, memory: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors under their names in memory → as `save_pretrained` writes them. Raises UserError
        when one is missing or has a shape that the model does not give it."""
        from transformers.core_model_loading import revert_weight_conversion

        self._check_memory(memory)
        known = {name: traced(memory[name]) for name in memory if name in self.shapes}
        found: dict[str, Tensor] = {}
        with self._converting("the tensors of the checkpoint"):
            made = revert_weight_conversion(self.model, known)
        for name, tensor in _lazy(made):
            _add(found, name, tensor)
        for name, tensor in memory.items():
            if name not in known:
                _add(found, name, tensor)
        return found

    def _renamed(self, disk: Iterable[str]) -> Iterator[tuple[str, str, str | None, Any]]:
        """Name on disk, in memory, and the pattern and converter that take it there, if any do:
        the rules of transformers' `convert_and_load_state_dict_in_model`."""
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        conversions = deepcopy(self.conversions)  # some remember the names that they have seen
        renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
        converters = [each for each in conversions if isinstance(each, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
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
        found = {tied.get(name, name) for name in memory} | self.optional
        if missing := [name for name in self.shapes if tied.get(name, name) not in found]:
            raise UserError(
                f"the checkpoint lacks {_few(missing)} of {type(self.model).__name__}, the class "
                f"that {self.folder / 'config.json'} names; give the config it was trained with"
            )
        for name, shape in self.shapes.items():
            given = memory[name].shape if name in memory else shape
            if given != shape and not (name in self.resizable and given[1:] == shape[1:]):
                raise UserError(
                    f"{name} has the shape {list(given)}, {type(self.model).__name__} of "
                    f"{self.folder} gives it {list(shape)}; give the config it was trained with"
                )

    @contextmanager
    def _converting(self, what: str) -> Iterator[None]:
        try:
            with torch.no_grad():
                yield
        except (ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
            operations = {
                type(operation).__name__
                for each in self.conversions
                for operation in getattr(each, "operations", ())
            }
            done = ", ".join(sorted(operations)) or "renaming"
            raise UserError(
                f"{what} cannot be converted as transformers does for {type(self.model).__name__} "
                f"({done}): {error or type(error).__name__}"
            ) from error


def find_naming(
    config_folder: Path, trust_remote_code: bool = False, names: Iterable[str] = ()
) -> Naming:
    """The namings of the model whose `config.json` is in the folder.

    `names`: the tensors of the base model on disk. Where a class reads several layouts, those
    conversions are reverted that these names need, as `save_pretrained` does after
    `from_pretrained`; without names, as it does for a model made in memory. Raises UserError when
    transformers has no such class.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    model = _on_meta(config_folder, trust_remote_code)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    naming = Naming(
        config_folder,
        model,
        tuple(get_model_conversion_mapping(model)),
        shapes,
        frozenset(_resizable(model)),
        frozenset(_optional(model, shapes)),
    )
    if names:
        model._weight_conversions = _used(naming.conversions, names)
    return naming


def build_on_meta(config: dict[str, Any]) -> Any:
    """The model that the contents of a `config.json` describe, without data. Raises UserError when
    transformers has no such class."""
    import transformers

    kind = config.get("model_type", "null")
    if kind not in transformers.CONFIG_MAPPING:
        raise UserError(
            f"config.json: model_type is {kind}, which transformers {transformers.__version__} "
            f"does not have; trust the folder's own code if it has any"
        )
    return _build(transformers.CONFIG_MAPPING[kind].from_dict(config))


def _on_meta(folder: Path, trust_remote_code: bool) -> Any:
    import transformers

    config_file = folder / "config.json"
    if not config_file.is_file():
        raise UserError(f"{folder} has no config.json; give the folder of the base model")
    try:
        values = json.loads(config_file.read_text())
    except ValueError as error:
        raise UserError(f"{config_file} is no JSON: {error}") from error
    remote = values.get("auto_map", {}) if trust_remote_code else {}
    if "AutoConfig" not in remote:
        return build_on_meta(values)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    ends = tuple(f".{each}" for each in values.get("architectures") or ())
    builder = next((name for name, path in remote.items() if path.endswith(ends)), "AutoModel")
    with torch.device("meta"):
        return getattr(transformers, builder).from_config(config, trust_remote_code=True)


def _build(config: Any) -> Any:
    import transformers

    architecture = (config.architectures or ["null"])[0]
    if not hasattr(transformers, architecture):
        raise UserError(
            f"config.json: architectures names {architecture}, which transformers "
            f"{transformers.__version__} does not have; trust the folder's own code if it has any"
        )
    with torch.device("meta"):
        build = getattr(transformers, architecture)._from_config
        return build(config, attn_implementation="eager")  # no library is needed to build that


def _used(conversions: tuple[Any, ...], names: Iterable[str]) -> list[Any]:
    """Those of the conversions that change any of the names."""
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    tried = deepcopy(conversions)
    renamings = [each for each in tried if isinstance(each, WeightRenaming)]
    converters = [each for each in tried if isinstance(each, WeightConverter)]
    for name in sorted(names, key=dot_natural_key):
        rename_source_key(name, renamings, converters)
    return [each for each in tried if each.was_used()]


def _resizable(model: Any) -> Iterator[str]:
    """Parameters of the input and output embeddings."""
    ends = set()
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        with suppress(NotImplementedError):  # a model without tokens
            ends.add(get())
    for path, module in model.named_modules(remove_duplicate=False):
        if module in ends:
            yield from (f"{path}.{name}" for name, _ in module.named_parameters(recurse=False))


def _optional(model: Any, shapes: Iterable[str]) -> Iterator[str]:
    yield from model._keys_to_ignore_on_save or ()
    patterns = [re.compile(each) for each in model._keys_to_ignore_on_load_missing or ()]
    yield from (name for name in shapes if any(each.search(name) for each in patterns))


def _lazy(made: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in made.items():
        tensor: Tensor = (value[0] if isinstance(value, list) else value).lazy
        yield name, tensor.called(name)


def _add(found: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    if name in found:
        raise UserError(
            f"{tensor.name} and another tensor are both {name} once renamed; delete one of them"
        )
    found[name] = tensor.called(name)


def _few(names: list[str]) -> str:
    """'a', or 'a and 3 more'."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
