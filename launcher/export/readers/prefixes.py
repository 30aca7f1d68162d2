"""Names as wrappers changed them, and as the model has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from launcher.errors import UserError
from launcher.export.tensor import Tensor

# torch.compile, FSDP1 and activation checkpointing wrap modules anywhere in the model.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
LEADING = {"module", "_forward_module"}  # of DataParallel and of Lightning: the whole model


def clean(name: str) -> str | None:
    """The name without what wrappers added; None for what is no weight (`_extra_state`).

    `base_model.model.` of an adapter stays.
    """
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] in LEADING:
        del parts[0]
    return None if parts[-1] == "_extra_state" else ".".join(parts)


def cleaned(names: Iterable[str], origin: Path) -> dict[str, str]:
    """Name → clean name of all that are weights. Raises UserError when two become one."""
    result: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in names:
        if (short := clean(name)) is None:
            continue
        if short in taken:
            raise UserError(f"{origin} holds both {taken[short]} and {name}, which are one weight")
        result[name], taken[short] = short, name
    return result


def with_clean_names(tensors: Mapping[str, Tensor], origin: Path) -> dict[str, Tensor]:
    return {new: tensors[old].called(new) for old, new in cleaned(tensors, origin).items()}


def dropped(names: Iterable[str], what: str) -> tuple[str, ...]:
    """A note on entries left out, or none."""
    listed = sorted(names)
    if not listed:
        return ()
    shown = ", ".join(listed[:3]) + (", …" if len(listed) > 3 else "")
    return (f"left out {len(listed)} entr{'y' if len(listed) == 1 else 'ies'} {what}: {shown}",)
