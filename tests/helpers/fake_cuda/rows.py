"""What a step sent and waited for as lines of a table that hold for a model of any size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from tests.helpers.fake_cuda import Seen
from tests.helpers.fake_cuda.parts import LARGE, Size, name_of

FEW = 2  # a number that is shown: larger ones depend on the model
ZERO3_GATHER = "gathers of partition_parameters"
TIMES = (1.0, "up to once"), (2.0, "up to twice")
AGAIN = ("backward", "all-gather")
SIXTEEN_BITS = ("bfloat16", "float16")


class Sent(NamedTuple):
    """Messages of one kind."""

    when: str  # forward, backward or step; of every micro-batch if it does not say of which
    kind: str
    dtype: str
    what: str  # the part of the model
    messages: str  # how many
    ranks: str  # in the group


class Waited(NamedTuple):
    """The host waited for the device."""

    when: str
    reason: str
    where: str  # functions, the innermost first
    times: str  # in a step, or in each micro-batch


Message = tuple[str, str, str, int, int, str]


def sent(seen: Seen, in_buckets: bool) -> list[Sent]:
    """What the step of `seen` sent, in the order in which each kind of message first appears.
    `in_buckets`: messages consist of tensors of any layers, as DeepSpeed's."""
    return _merged({p: _of_phase(seen, p, in_buckets) for p in _phases(seen.messages)})


def waited(seen: Seen) -> list[Waited]:
    """Where the host waited in the step of `seen`."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for text, times in seen.waits.items():
        phase, _, rest = text.partition(": ")
        reason, _, where = rest.partition(" @ ")
        # ZeRO-3 gathers by several ways, and which one depends on the dtypes of a layer.
        is_gather = where.startswith("partition_parameters._all_gather")
        counts[phase, reason, ZERO3_GATHER if is_gather else where] += times
    by_phase: dict[str, list[Waited]] = {}
    for (phase, reason, where), times in counts.items():
        shown = str(times) if times <= FEW else "many"
        by_phase.setdefault(phase, []).append(Waited(phase, reason, where, shown))
    return _merged(by_phase)


def _phases(messages: Iterable[Message]) -> list[str]:
    return list(dict.fromkeys(message[0] for message in messages))


def _of_phase(seen: Seen, phase: str, in_buckets: bool) -> list[Sent]:
    """The lines of one phase: one for each kind of message and part of the model, or with buckets
    one for each kind."""
    parts = {name: Size(*size) for name, size in seen.parts.items()}
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for at, kind, dtype, elements, ranks, device in seen.messages:
        if at == phase:
            kinds.setdefault((kind, dtype, ranks, device, elements == 1), []).append(elements)
    rows = []
    for (kind, dtype, ranks, device, is_number), sizes in kinds.items():
        shown = "16-bit" if dtype in SIXTEEN_BITS else dtype
        shown += " on the CPU" if device == "cpu" else ""
        if is_number:
            named = {"a number": str(len(sizes)) if len(sizes) <= FEW else "many"}
        elif in_buckets:
            named = _of_buckets(sizes, dtype, parts, exact=(phase[:8], kind) != AGAIN)
        else:
            # What is reduced over replicas is a shard.
            scale = seen.ranks // ranks if kind == "all-reduce" else 1
            names = Counter(name_of(scale * size, dtype, parts) or f"? {size}" for size in sizes)
            part = "a shard of " if scale > 1 else ""
            named = {part + name: _count(name, count, parts) for name, count in names.items()}
        rows += [Sent(phase, kind, shown, what, count, str(ranks)) for what, count in named.items()]
    return rows


def _of_buckets(
    sizes: list[int], dtype: str, parts: dict[str, Size], exact: bool
) -> dict[str, str]:
    """What messages contain together → how many they are. DeepSpeed keeps and prefetches weights,
    so that it gathers some of them twice and others not at all (not `exact`)."""
    total = sum(sizes)
    if not exact:
        large = parts[LARGE].quantized if dtype == "uint8" else parts[LARGE].floating
        times = next((words for most, words in TIMES if total <= most * large), f"? {total}")
        return {f"{LARGE}, {times}": "in buckets"}
    return {name_of(total, dtype, parts, of_all=True) or f"? {total}": "in buckets"}


def _count(name: str, count: int, parts: dict[str, Size]) -> str:
    """`count` messages of the part `name`, independently of how many layers there are."""
    part = name.partition(":")[0]
    numbered = [each for each in parts if each[-1].isdigit() and each.rsplit(" ", 1)[0] == part]
    if numbered and count % len(numbered) == 0:
        return f"{count // len(numbered)} for each"
    return str(count)


def _merged(rows_by_phase: dict[str, list[Any]]) -> list[Any]:
    """One line for what both micro-batches do, in the order of the last one."""
    merged: list[Any] = []
    for name in ("forward", "backward"):
        first, last = (
            [row._replace(when=name) for row in rows_by_phase.get(f"{name} {number}", ())]
            for number in (1, 2)
        )
        merged += [row._replace(when=f"first {name}") for row in first if row not in last]
        merged += [r if r in first else r._replace(when=f"last {name}") for r in last]
    return merged + list(rows_by_phase.get("step", ()))
