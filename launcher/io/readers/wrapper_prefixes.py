"""Removes from tensor names what wrapper modules added to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from launcher.errors import UserError
from launcher.io.tensor import Tensor

# torch.compile, FSDP1 and activation checkpointing wrap modules anywhere in the model.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# DataParallel and Lightning wrap the whole model.
LEADING_WRAPPERS = {"module", "_forward_module"}


def strip_wrappers(name: str) -> str | None:
    """The name without the parts that wrappers added, or None if it is not a weight
    (`_extra_state`).

    An adapter's prefix `base_model.model.` is kept.
    """
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] in LEADING_WRAPPERS:
        del parts[0]
    return None if parts[-1] == "_extra_state" else ".".join(parts)


def stripped_names(names: Iterable[str], origin: Path) -> dict[str, str]:
    """Name → name without wrappers, for all names of weights.

    Raises UserError if two of them become the same name. `origin`: the file, for the message.
    """
    result: dict[str, str] = {}
    original: dict[str, str] = {}
    for name in names:
        if (short := strip_wrappers(name)) is None:
            continue
        if short in original:
            raise UserError(
                f"{origin} contains both {original[short]} and {name}, which are the same weight"
            )
        result[name], original[short] = short, name
    return result


def with_stripped_names(tensors: Mapping[str, Tensor], origin: Path) -> dict[str, Tensor]:
    """The tensors that are weights, by their names without wrappers."""
    return {new: tensors[old].renamed(new) for old, new in stripped_names(tensors, origin).items()}


def skipped_note(names: Iterable[str], description: str) -> tuple[str, ...]:
    """A note that lists skipped entries, or () if there are none. `description` comes after their
    number."""
    skipped = sorted(names)
    if not skipped:
        return ()
    shown = ", ".join(skipped[:3]) + (", …" if len(skipped) > 3 else "")
    entries = f"{len(skipped)} entr{'y' if len(skipped) == 1 else 'ies'}"
    return (f"left out {entries} {description}: {shown}",)
