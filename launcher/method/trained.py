"""What is trained and what is not, by group: the table at the start of a log."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn

from launcher.model.quantised import QuantisedLinear

# The first that a parameter's name contains is its group.
GROUPS = (
    ("adapter", r"\.lora_"),
    ("head", r"lm_head|embed_out"),
    ("embedding", r"embed|\bwte\b|\bwpe\b"),
    ("norm", r"norm|\bln_\w+"),
    ("attention", r"attn|attention"),
    ("mlp", r"mlp|feed_forward|ffn|experts"),
    ("other", r""),
)


def describe(model: nn.Module, master: torch.dtype, compute: torch.dtype) -> str:
    """A table of counts, dtypes and bytes by group. Trained parameters are held in `master`,
    frozen ones in `compute`, whatever they are now; quantised ones as they are stored."""
    rows: dict[tuple[str, bool, str], tuple[int, int, int]] = {}
    quantised = {id(m.weight): m for m in model.modules() if isinstance(m, QuantisedLinear)}
    for name, parameter in model.named_parameters():
        held = master if parameter.requires_grad else compute
        layer = quantised.get(id(parameter))
        count, kind = parameter.numel(), str(held).removeprefix("torch.")
        nbytes = count * held.itemsize
        if layer is not None:
            count, kind = layer.in_features * layer.out_features, layer.scales.kind
            nbytes = parameter.nbytes + layer.scales.nbytes
        key = _group(name), parameter.requires_grad, kind
        tensors, counted, size = rows[key] if key in rows else (0, 0, 0)
        rows[key] = tensors + 1, counted + count, size + nbytes
    total = sum(count for _, count, _ in rows.values())
    trained = sum(count for (_, learns, _), (_, count, _) in rows.items() if learns)
    head = f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.2f} %)"
    return "\n".join([head, *_lines(rows)])


def _group(name: str) -> str:
    return next(group for group, pattern in GROUPS if re.search(pattern, name))


def _lines(rows: dict[tuple[str, bool, str], tuple[int, int, int]]) -> Iterator[str]:
    order = [group for group, _ in GROUPS]
    columns = ("group", "", "tensors", "parameters", "dtype", "MB")
    widths = "  {:<10} {:<8} {:>7} {:>15} {:<9} {:>12}"
    yield widths.format(*columns).rstrip()
    for (group, learns, dtype), (tensors, count, size) in sorted(
        rows.items(), key=lambda row: (not row[0][1], order.index(row[0][0]))
    ):
        state = "trained" if learns else "frozen"
        yield widths.format(group, state, tensors, f"{count:,}", dtype, f"{size / 1e6:,.3f}")
