"""Which class of transformers is trained for a config.json, and where its parts are in the class
that the folder's files belong to.

A composite (`Qwen3_5ForConditionalGeneration`: a vision tower and a text model) is trained as its
text model alone (`Qwen3_5ForCausalLM`), the class that AutoModelForCausalLM picks for the one or
for the other. The parameters of that class have other paths than in the composite: `model.layers.0`
is `model.language_model.layers.0` there. A composite whose text model has no such class
(`Qwen3VLForConditionalGeneration`) is trained itself, on text. Training, checkpoints, export, chat
and plan ask here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from launcher.errors import UserError, first_sentence, one_line
from launcher.io.absent_towers import towers_may_be_absent
from launcher.io.adapter import PREFIX, read_adapter
from launcher.io.head_output import differs_behind_head
from launcher.io.places import Places, renamed

ATTRIBUTE = "shardway_places"  # of a model that is trained alone: its `Places`


def config_of(values: Mapping[str, Any]) -> Any:
    """transformers' configuration from the contents of a `config.json`, in which infinity is an
    object (`{"__float__": "Infinity"}`), as AutoConfig reads it.

    Raises KeyError for a model_type that transformers does not have, and what the class raises.
    """
    import transformers

    decoded = transformers.PreTrainedConfig._decode_special_floats(dict(values))
    return transformers.CONFIG_MAPPING[values["model_type"]].from_dict(decoded)


def causal_class(config: Any) -> Any:
    """The class that AutoModelForCausalLM picks for a configuration; None: it has none."""
    import transformers

    return _auto_class(transformers.AutoModelForCausalLM, config)


def _auto_class(auto: Any, config: Any) -> Any:
    from transformers.models.auto.auto_factory import _get_model_class

    mapping = auto._model_mapping
    return _get_model_class(config, mapping) if type(config) in mapping else None


def _is_body(named: Any, trained: Any, config: Any) -> bool:
    """Whether `named` is `trained` without its head, which is the embedding."""
    import transformers

    # Where a config does not define it, transformers ties nothing.
    ties = getattr(config, "tie_word_embeddings", False)
    is_tied = trained.config_class is type(config) and ties
    return is_tied and named is _auto_class(transformers.AutoModel, config)


def text_class(config: Any) -> Any:
    """The class that AutoModelForCausalLM picks for the text model of a composite; None: it has
    none, or `config` is not that of a composite."""
    text = config.get_text_config(decoder=True)
    found = None if text is config else causal_class(text)
    return found if found is not None and found.config_class is type(text) else None


def trained_class(config: Any) -> Any:
    """The class that is trained for the configuration of a folder.

    Raises UserError for an encoder-decoder, for a model that is not a causal language model, and
    for a class that is not part of the one that `config` names: its training could not be exported.
    """
    return class_and_places(config)[0]


def trained_config(trained: Any, config: Any) -> Any:
    """The configuration by which the class that is trained is built: `config`, or that of its text
    model."""
    text = config.get_text_config(decoder=True)
    return text if trained.config_class is type(text) else config


def named_class(config: Any) -> Any:
    """The class that `architectures` of a config.json names; None: it names none, or transformers
    does not have it."""
    import transformers

    name = (getattr(config, "architectures", None) or [None])[0]
    return getattr(transformers, name, None) if isinstance(name, str) else None


def class_of_files(config: Any) -> Any:
    """The class by which the files of a folder are converted: the one that its config names, with
    its head if it has none. None as for `named_class`."""
    named, trained = named_class(config), causal_class(config)
    return trained if trained is not None and _is_body(named, trained, config) else named


def class_to_load(folder: Path, adapter: Path | None = None) -> Any:
    """The class by which the model of a folder is loaded: the one that is trained for it, unless
    the adapter is for the composite that config.json names."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    composite, trained = named_class(config), causal_class(config)
    if trained is None and composite is not None:
        return composite
    if adapter is None or composite in (None, trained):
        return AutoModelForCausalLM
    places = find_places(trained, composite, config)
    names = (name.removeprefix(PREFIX) for name in read_adapter(adapter).tensors)
    is_composite = places is not None and any(map(places.is_outer, names))
    return composite if is_composite else AutoModelForCausalLM


def trained_places(config: Any) -> Places | None:
    """Where the class that is trained is in the class that `config` names; None if they are the
    same but for a head, or if `config` names no class.

    `config`: of transformers. Raises UserError as `trained_class` does.
    """
    return class_and_places(config)[1]


def class_and_places(config: Any) -> tuple[Any, Places | None]:
    """`trained_class` and `trained_places`: the class that AutoModelForCausalLM picks for the
    folder or for its text model, or else a composite itself."""
    outer, inner = named_class(config), causal_class(config)
    name = outer.__name__ if outer else f"a model of type {config.model_type}"
    if config.is_encoder_decoder:
        raise UserError(
            f"{name} is an encoder-decoder: its encoder reads the prompt, and rows are trained "
            "here as one text → a decoder-only model (…ForCausalLM)"
        )
    try:
        if inner is not None:
            return inner, _places_of_causal(inner, outer, config)
        text = text_class(config)
        if None not in (text, outer) and (places := find_places(text, outer, config, True)):
            return text, places
        if outer is not None and _has_head(outer, config):
            return outer, None
    except UserError:
        raise
    except ImportError as error:
        reason = f"{first_sentence(error)} → install it for the ranks and for the export"
        raise UserError(f"{name} cannot be built: {reason}") from error
    except Exception as error:  # of other values
        raise UserError(f"{name} cannot be built: {one_line(error)}") from error
    raise UserError(
        f"{name} is not a causal language model → a model that AutoModelForCausalLM has "
        "(…ForCausalLM), or a composite that generates text"
    )


def _places_of_causal(inner: Any, outer: Any, config: Any) -> Places | None:
    if outer in (None, inner) or _is_body(outer, inner, config):
        return None
    places = find_places(inner, outer, config)
    if places is None:
        raise UserError(
            f"config.json names {outer.__name__}, and {inner.__name__}, which would be trained, is "
            f"not part of it: the result could not be exported → convert it once: transformers."
            f"{inner.__name__}.from_pretrained(FOLDER).save_pretrained(NEW)"
        )
    return places


def _has_head(model_class: Any, config: Any) -> bool:
    """Whether a class of `config` generates: it has a head with a row for each token."""
    generates = model_class.can_generate() and hasattr(model_class, "prepare_inputs_for_generation")
    if not generates or not _is_of(model_class, config):
        return False
    model = meta_model(model_class, config)
    return model.get_output_embeddings() is not None


def _is_of(model_class: Any, config: Any) -> bool:
    """Whether a class is built from a configuration; some are built from those of other types."""
    import transformers

    autos = transformers.AutoModelForImageTextToText, transformers.AutoModelForMultimodalLM
    return model_class.config_class is type(config) or any(
        _auto_class(auto, config) is model_class for auto in autos
    )


def find_places(
    inner_class: Any, outer_class: Any, config: Any, same_logits: bool = False
) -> Places | None:
    """Where the parts of `inner_class` are in `outer_class`, which `config` describes; None if
    these are not exactly one place with the same parameters for each part.

    `same_logits`: None, too, if only one of the two scales or caps its logits (Aya Vision: its text
    model does).
    """
    outer = meta_model(outer_class, config)
    inner = meta_model(inner_class, trained_config(inner_class, config))
    prefixes = _prefixes(inner, outer)
    if prefixes is None or (same_logits and differs_behind_head(inner, outer)):
        return None
    paths = {renamed(name, prefixes) for name, _ in inner.named_modules() if name}
    others = {name for name, _ in outer.named_modules() if name} - paths
    places = Places(inner_class.__name__, outer_class.__name__, prefixes, frozenset(others))
    shapes = {name: value.shape for name, value in outer.state_dict().items()}
    same = all(
        shapes.get(places.outer(name)) == value.shape for name, value in inner.state_dict().items()
    )
    return places if same else None


def _prefixes(inner: Any, outer: Any) -> tuple[tuple[str, str], ...] | None:
    """(path in `inner`, path in `outer`) of each part. Parts are equal if their classes are, and
    the heads are equal."""
    whole = [path for path, module in outer.named_modules() if type(module) is type(inner)]
    if len(whole) == 1:
        return (("", whole[0]),)
    head, outer_head = inner.get_output_embeddings(), outer.get_output_embeddings()
    prefixes = []
    for path, part in inner.named_children():
        found = [
            each
            for each, module in outer.named_modules()
            if (module is outer_head if part is head else type(module) is type(part))
        ]
        if len(found) != 1:
            return None
        prefixes.append((path, found[0]))
    return tuple(prefixes)


def meta_model(model_class: Any, config: Any) -> Any:
    """A model of transformers' class, without data, and without the towers that need a package
    which is not installed."""
    with towers_may_be_absent(), torch.device("meta"):  # eager attention needs no other library
        return model_class._from_config(config, attn_implementation="eager")


def remember_places(model: Any, places: Places | None) -> None:
    """Attach `places` to a model that is trained alone, for `places_of`."""
    setattr(model, ATTRIBUTE, places)


def places_of(model: Any) -> Places | None:
    """Where the model is in the composite of its folder; None: it is not part of one."""
    found: Places | None = getattr(model, ATTRIBUTE, None)
    return found
