"""The table of trained and frozen parameters at the start of a log."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from launcher.model.quantized_linear import QuantizedLinear
from launcher.model.sparse import sparse_blocks

# A parameter belongs to the first group whose pattern its name contains. Experts and routers, which
# are found by what they are, come first; `adapter of …` if the parameter is one of their adapters.
SPARSE = ("experts", "router")
GROUPS = (
    ("adapter", r"\.lora_"),
    ("head", r"lm_head|embed_out"),
    ("embedding", r"embed|\bwte\b|\bwpe\b"),
    ("norm", r"norm|\bln_\w+"),
    ("attention", r"attn|attention"),
    ("mlp", r"mlp|feed_forward|ffn|experts"),
    ("other", r""),
)
ORDER = (*(f"adapter of {group}" for group in SPARSE), *(group for group, _ in GROUPS), *SPARSE)


class RowKey(NamedTuple):
    """The parameters that one row of the table adds up."""

    group: str
    is_trained: bool
    dtype: str


class RowTotals(NamedTuple):
    """The values in one row of the table."""

    tensors: int = 0
    parameters: int = 0
    nbytes: int = 0


def describe_parameters(model: nn.Module, master: torch.dtype, compute: torch.dtype) -> str:
    """A table of counts, dtypes and bytes by group.

    Trained parameters count as `master` and frozen ones as `compute`, whatever their dtype is now.
    Quantized parameters count as they are stored.
    """
    rows: dict[RowKey, RowTotals] = {}
    quantized = {id(m.weight): m for m in model.modules() if isinstance(m, QuantizedLinear)}
    sparse = _sparse_groups(model)
    for name, parameter in model.named_parameters():
        dtype = master if parameter.requires_grad else compute
        layer = quantized.get(id(parameter))
        count, dtype_name = parameter.numel(), str(dtype).removeprefix("torch.")
        nbytes = count * dtype.itemsize
        if layer is not None:
            count, dtype_name = layer.in_features * layer.out_features, layer.scales.kind
            nbytes = parameter.nbytes + layer.scales.nbytes
        key = RowKey(_group(name, sparse), parameter.requires_grad, dtype_name)
        totals = rows.get(key, RowTotals())
        rows[key] = RowTotals(totals.tensors + 1, totals.parameters + count, totals.nbytes + nbytes)
    total = sum(totals.parameters for totals in rows.values())
    trained = sum(totals.parameters for key, totals in rows.items() if key.is_trained)
    head = f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.2f} %)"
    return "\n".join([head, *_lines(rows)])


def _sparse_groups(model: nn.Module) -> dict[str, str]:
    """Path of experts or of a router → its group."""
    blocks = sparse_blocks(model)
    routers = {path: "router" for block in blocks for path in block.routers}
    return {block.path: "experts" for block in blocks} | routers


def _group(name: str, sparse: dict[str, str]) -> str:
    path = name.replace(".base_layer", "")
    group = next((group for each, group in sparse.items() if path.startswith(f"{each}.")), None)
    if group is None:
        return next(group for group, pattern in GROUPS if re.search(pattern, name))
    return f"adapter of {group}" if ".lora_" in name else group


def _lines(rows: dict[RowKey, RowTotals]) -> Iterator[str]:
    """The header and one line for each row, trained parameters first."""
    columns = ("group", "", "tensors", "parameters", "dtype", "MB")
    width = max(10, *(len(key.group) for key in rows))
    widths = f"  {{:<{width}}} {{:<8}} {{:>7}} {{:>15}} {{:<9}} {{:>12}}"
    yield widths.format(*columns).rstrip()
    for key, totals in sorted(
        rows.items(), key=lambda row: (not row[0].is_trained, ORDER.index(row[0].group))
    ):
        state = "trained" if key.is_trained else "frozen"
        parameters, megabytes = f"{totals.parameters:,}", f"{totals.nbytes / 1e6:,.3f}"
        yield widths.format(key.group, state, totals.tensors, parameters, key.dtype, megabytes)
