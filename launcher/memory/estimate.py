"""Computes dry runs from short traces. Imports no torch.

Every amount of a trace (bytes, operations) is linear in the number of layers and in the
micro-batch: the memory of each phase, too, if phases are as short as a place among the layers. So
two numbers of layers and two micro-batches give all others. What a longer row or recomputation
changes is the same under every strategy: it is traced under one of them, and added to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Amounts = dict[str, float]
SEPARATOR = "@"  # in a phase, between what computes and where


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What a dry run of a model with some of its layers needs."""

    layers: int
    all_layers: int
    amounts: Amounts
    wider: Amounts  # with more rows in a micro-batch; empty if that was not asked


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The amounts of a run. Peaks are of the GPU, in bytes."""

    amounts: Amounts
    accumulates: bool  # a step has several micro-batches

    @property
    def _peaks(self) -> Amounts:
        prefix = f"peak{1 + self.accumulates}/"
        return {k.removeprefix(prefix): v for k, v in self.amounts.items() if k.startswith(prefix)}

    @property
    def peak(self) -> int:
        return round(max(self._peaks.values()))

    @property
    def phase(self) -> str:
        peaks = self._peaks
        return max(peaks, key=lambda phase: peaks[phase]).partition(SEPARATOR)[0]


def combine(
    function: Callable[..., float], first: Mapping[str, float], *others: Mapping[str, float]
) -> Amounts:
    """`function` of the values of each name in `first`; a name that another lacks has the value of
    the first."""
    return {k: function(v, *(other.get(k, v) for other in others)) for k, v in first.items()}


def at_all_layers(few: Trace, more: Trace) -> tuple[Amounts, Amounts]:
    """The amounts of the whole model, and those with more rows. `more` has more layers than `few`,
    unless that has all of them already."""
    if few.layers == few.all_layers:
        return few.amounts, few.wider
    steps = (few.all_layers - few.layers) / (more.layers - few.layers)

    def whole(first: Amounts, second: Amounts) -> Amounts:
        found = combine(lambda a, b: a + steps * (b - a), first, second)
        # What is made only once in a process may be in the first trace and not in the second.
        return found | {k: max(found[k], v) for k, v in first.items() if _is_of_loading(k)}

    return whole(few.amounts, more.amounts), whole(few.wider, more.wider)


def at_micro_batch(low: tuple[int, Amounts], high: tuple[int, Amounts], rows: int) -> Amounts:
    """The amounts at `rows`, from those at two micro-batches (rows, amounts)."""
    (first, at_first), (second, at_second) = low, high
    share = (rows - first) / (second - first) if second > first else 0.0
    return combine(lambda a, b: a + share * (b - a), at_first, at_second)


def moved(base: Amounts, reference: Amounts, target: Amounts) -> Amounts:
    """`base` changed as `reference` is changed to `target`. Loading stays as it is."""
    found = combine(lambda a, b, c: a + c - b, base, reference, target)
    return found | {k: v for k, v in base.items() if _is_of_loading(k)}


def partly_recomputed(full: Amounts, none: Amounts, every: int) -> Amounts:
    """The amounts if the first of every `every` layers is recomputed: work in between, and what the
    other layers keep on top of the peaks of full recomputation."""
    layers = round(full["layers"])
    share = 1 - -(-layers // every) / layers  # of the layers that keep their activations
    result = combine(lambda a, b: a + share * (b - a), full, none)
    kept = share * (none["kept"] - full["kept"])
    for name in result:
        if name.startswith("peak"):
            added = 0 if name.endswith("optimizer step") else kept
            result[name] = min(full[name] + added, max(full[name], none.get(name, full[name])))
    return result


def _is_of_loading(name: str) -> bool:
    return name.startswith("peak") and name.endswith("/loading")
