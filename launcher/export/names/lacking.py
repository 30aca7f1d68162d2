"""The refusal of a checkpoint that lacks tensors of the model's class."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from launcher.errors import UserError
from launcher.folders.brief import listed

LISTED = 3  # names in a message
# A name of other programs' models → what turns it into those of Hugging Face.
PROGRAMS = {
    "tok_embeddings.weight": "torchtitan has scripts/checkpoint_conversion/convert_to_hf.py",
}


def refusal(
    folder: Path,
    class_name: str,
    missing: Sequence[str],
    found: Collection[str],
    known: Collection[str],
) -> UserError:
    """`missing`: the names that the class has and the checkpoint lacks. `found`: the checkpoint's.
    `known`: the class's. `folder`: of config.json."""
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    text = f"the checkpoint lacks {missing[0]}{more} of {class_name}, the class that "
    text += f"{folder / 'config.json'} names"
    others = sorted(set(found) - set(known))
    models = sorted({n.partition(".")[0] for n in others if n.partition(".")[2] in known})
    if len(models) > 1:
        return UserError(
            f"{text}, but several models by names that begin with {listed(models, LISTED)} → "
            f"--model-key {models[0]}, or another of them"
        )
    if not others:
        return UserError(f"{text} → all files of the checkpoint, or the config it was trained with")
    text += f", and has {listed(others, LISTED)}, which the class does not have → "
    programs = [
        way for name, way in PROGRAMS.items() if any(each.endswith(name) for each in others)
    ]
    if programs:
        return UserError(f"{text}the names of Hugging Face: {programs[0]}")
    return UserError(
        f"{text}the config it was trained with, or, if another program names its tensors so, what "
        "that program exports for Hugging Face"
    )
