"""Which entries of a saved model are weights, and their names without what wrappers added."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from launcher.errors import UserError
from launcher.folders.brief import listed
from launcher.io.tensor import Tensor

# torch.compile, FSDP1 and activation checkpointing wrap modules anywhere in the model.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# DataParallel and Lightning wrap the whole model.
LEADING_WRAPPERS = {"module", "_forward_module"}
PEFT_WRAPPER = ["base_model", "model"]  # of a PEFT model; what is before it wraps that
# What torch's optimizers keep for each parameter, under names that no module has.
MOMENTS = {
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "exp_avg_sq_row", "exp_avg_sq_col",
    "momentum_buffer", "square_avg", "grad_avg", "acc_delta",
}  # fmt: skip
# Tensors that bitsandbytes stores beside a quantized weight.
QUANTIZATION_STATE = r".+\.(absmax|quant_map|nested_\w+|quant_state\..+|SCB|weight_format)"
NOT_WEIGHTS = "that are not weights"


def strip_wrappers(name: str) -> str | None:
    """The name without the parts that wrappers added, or None if it is not a weight
    (`_extra_state`, an optimizer's moment).

    An adapter's prefix `base_model.model.` is kept, and what is before it is not.
    """
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while len(parts) > 1 and parts[0] in LEADING_WRAPPERS:
        del parts[0]
    begins = (at for at in range(1, len(parts) - 2) if parts[at : at + 2] == PEFT_WRAPPER)
    if parts[:2] != PEFT_WRAPPER:
        del parts[: next(begins, 0)]
    if parts[-1] == "_extra_state" or MOMENTS & {*parts}:
        return None
    return ".".join(parts)


def stripped_names(names: Collection[str], origin: Path) -> dict[str, str]:
    """Name → name without wrappers, for all names of weights.

    An entry that is named after a tensor (`w` and `w.step`) is the state of an optimizer. Raises
    UserError if two of them become the same name. `origin`: the file, for the message.
    """
    result: dict[str, str] = {}
    original: dict[str, str] = {}
    known = {*names}
    for name in names:
        short = strip_wrappers(name)
        is_state = name.rpartition(".")[0] in known and not re.fullmatch(QUANTIZATION_STATE, name)
        if short is None or is_state:
            continue
        if short in original:
            raise UserError(
                f"{origin} contains both {original[short]} and {name}, which are the same weight "
                "→ SOURCE without one of them"
            )
        result[name], original[short] = short, name
    return result


def with_stripped_names(
    tensors: Mapping[str, Tensor], origin: Path
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """(the tensors that are weights, by their names without wrappers; a note on the others)."""
    short = stripped_names(tensors, origin)
    notes = skipped_note(tensors.keys() - short.keys(), NOT_WEIGHTS)
    return {new: tensors[old].renamed(new) for old, new in short.items()}, notes


def skipped_note(names: Iterable[str], description: str) -> tuple[str, ...]:
    """A note that lists skipped entries, or () if there are none. `description` comes after their
    number."""
    skipped = sorted(names)
    if not skipped:
        return ()
    entries = f"{len(skipped)} entr{'y' if len(skipped) == 1 else 'ies'}"
    return (f"left out {entries} {description}: {listed(skipped, 3)}",)
