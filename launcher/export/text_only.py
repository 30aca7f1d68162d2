"""`--text-only`: the text model of a composite as a folder of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from launcher.errors import UserError
from launcher.export import names
from launcher.export.assembled import Assembled, Config, Options, naming_of
from launcher.export.source import Source
from launcher.folders.model_config import NESTED
from launcher.folders.vocabulary import TIE
from launcher.io.model_class import config_of
from launcher.io.places import Places

# The keys of the composite's config.json that describe the text model if its own part lacks them.
SHARED = ("dtype", "torch_dtype", "bos_token_id", "eos_token_id", "pad_token_id")


def text_model(source: Source, result: Assembled, options: Options) -> Assembled:
    """The text model in `result`, by the names and with the config.json of its own class.

    Raises UserError if the model is a text model already, or if AutoModelForCausalLM has no class
    for its text model.
    """
    places = names.text_places(result.config)
    if places is None and NESTED not in result.config:
        model_class = ", ".join(result.config.get("architectures") or [result.config["model_type"]])
        raise UserError(
            f"--text-only: {source.path} is a text model already ({model_class}) → without "
            "--text-only"
        )
    if places is None:
        raise UserError(
            f"--text-only: {source.path} is not a composite whose text model AutoModelForCausalLM "
            "can load alone; leave it out"
        )
    naming = naming_of(source, options, result.tensors)
    memory = {
        places.inner(name): tensor
        for name, tensor in naming.to_memory(result.tensors).items()
        if places.contains(name)
    }
    tied = not {"lm_head.weight", "output.weight"} & memory.keys()
    config = _text_config(result.config, places, tied)
    tensors = names.naming_of_config(source.path, config).to_disk(memory)
    other = "merged" if source.adapters else "gathered" if source.read else "copied"
    actions = {name: result.actions.get(places.outer(name), other) for name in tensors}
    notes = [
        f"the text model alone ({places.inner_class}), without the rest of {places.outer_class}"
    ]
    if names.text_places(result.config, same_logits=True) is None:
        notes.append(
            f"only one of {places.inner_class} and {places.outer_class} scales or caps its logits: "
            "the likeliest token is the same, its probability is not"
        )
    return replace(
        result, tensors=tensors, actions=actions, config=config, notes=(*result.notes, *notes)
    )


def _text_config(config: Config, places: Places, tied: bool) -> dict[str, Any]:
    """The config.json of the text model. `tied`: it has no head of its own."""
    values = config_of(config)
    text = dict(config[NESTED])
    shared = {key: config[key] for key in SHARED if key in config and text.get(key) is None}
    model_type = values.get_text_config(decoder=True).model_type
    own = {"architectures": [places.inner_class], "model_type": model_type, TIE: tied}
    return text | shared | own
