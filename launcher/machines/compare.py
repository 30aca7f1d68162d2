"""Compare what machines say about themselves. What most of them have is right. Imports no torch."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from statistics import median, median_low
from typing import Any

from launcher.io.network import is_loopback
from launcher.machines.facts import Facts
from launcher.machines.findings import REFUSED, WARNING, Finding

NAMED = 3  # differences, or machines with the same one, in one message
MEMORY_IN_USE = 0.1  # of a GPU, from which another process must have it
# Times of the same work: longer than the median by these factors.
SLOW_WARNING, SLOW_REFUSED = 1.5, 3.0
# Bandwidth: of a machine's best pair, as a part of the median of the others'.
NARROW_WARNING, NARROW_REFUSED = 0.5, 0.1
CLOCK_WARNING, CLOCK_REFUSED = 1.0, 30.0  # seconds from the median


def find_differences(facts: list[Facts]) -> Iterator[Finding]:
    """What is wrong with the machines, of which `facts` has the first rank of each."""
    yield from _unreadable(facts)
    for node in facts:
        if not node.sees_note:
            yield Finding(
                REFUSED,
                f"{node.node} does not see in the run folder what {facts[0].node} writes there: "
                "run_dir must be on a file system that all machines share",
                (node.node,),
            )
    yield from _odd(facts, "config.yaml of the run", lambda node: {"it": node.config})
    yield from _odd(facts, "", lambda node: node.versions)
    yield from _odd(facts, "model file", lambda node: node.model)
    yield from _odd(facts, "data file", lambda node: node.data)
    yield from _limits(facts)
    yield from _gpus(facts)


def _unreadable(facts: list[Facts]) -> Iterator[Finding]:
    nodes = defaultdict(list)
    for node in facts:
        for problem in node.unreadable:
            nodes[problem].append(node.node)
    for problem, named in nodes.items():
        if len(named) == len(facts):
            yield Finding(REFUSED, problem)
        else:
            yield Finding(REFUSED, f"{_list(named)}: {problem}, on other machines it is", (*named,))


def _odd(
    facts: list[Facts], kind: str, read: Callable[[Facts], Mapping[str, Any]]
) -> Iterator[Finding]:
    """The machines on which an entry of what `read` returns is not as on most."""
    keys = dict.fromkeys(key for node in facts for key in read(node))
    found: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        values = [read(node).get(key) for node in facts]
        usual = Counter(values).most_common(1)[0][0]  # of equally frequent ones the first rank's
        for node, value in zip(facts, values, strict=True):
            if value != usual:
                found[node.node].append(_difference(kind, key, value, usual))
    for name, texts in found.items():
        more = f" and {len(texts) - NAMED} more" if len(texts) > NAMED else ""
        yield Finding(REFUSED, f"{name}: {', '.join(texts[:NAMED])}{more}", (name,))


def _difference(kind: str, key: str, value: str | None, usual: str | None) -> str:
    if not kind:
        return f"{key} {value or 'is missing'} (elsewhere {usual or 'missing'})"
    name = kind if key == "it" else f"{kind} {key}"
    if value is None or usual is None:
        return f"{name} is {'only elsewhere' if value is None else 'only here'}"
    return f"{name} has another content than elsewhere"


def _limits(facts: list[Facts]) -> Iterator[Finding]:
    limited = [node.node for node in facts if node.infiniband and node.locked_memory >= 0]
    if limited:
        yield Finding(
            WARNING,
            f"{_list(limited)}: locked memory is limited (ulimit -l), and InfiniBand needs much of "
            "it → LimitMEMLOCK=infinity of slurmd",
        )
    for node in facts:
        if node.interface and any(map(is_loopback, node.resolves_to)):
            yield Finding(
                WARNING,
                f"{node.node} resolves its own name to {node.resolves_to[0]}; the ranks use "
                f"{node.interface} ({node.address}) in its place, other programs may not",
            )


def _gpus(facts: list[Facts]) -> Iterator[Finding]:
    def odd(kind: str, read: Callable[[Facts], str], status: str) -> Iterator[Finding]:
        values = [read(node) for node in facts]
        usual = Counter(values).most_common(1)[0][0]
        for node, value in zip(facts, values, strict=True):
            if value != usual:
                text = f"{node.node}: {kind} {value or 'none'} (elsewhere {usual or 'none'})"
                yield Finding(status, text, (node.node,))

    def kinds(node: Facts) -> str:
        counted = Counter(f"{gpu.name} {gpu.memory / 1e9:.0f} GB" for gpu in node.gpus)
        return ", ".join(f"{count} × {name}" for name, count in counted.items())

    yield from odd("GPUs", kinds, REFUSED)
    yield from odd("driver", lambda node: node.gpus[0].driver if node.gpus else "", WARNING)
    for node in facts:
        for at, gpu in enumerate(node.gpus):
            where = f"{node.node}, GPU {at} ({gpu.uuid})"
            if gpu.uncorrected:
                text = f"{where}: {gpu.uncorrected} uncorrected ECC errors → reset or replace it"
                yield Finding(REFUSED, text, (node.node,))
            if gpu.throttled:
                heat = "" if gpu.temperature is None else f" at {gpu.temperature} °C"
                text = f"{where} is throttled{heat}: {gpu.throttled}"
                yield Finding(REFUSED, text, (node.node,))
            in_use = 0 if gpu.free is None else gpu.memory - gpu.free
            if in_use > MEMORY_IN_USE * gpu.memory:
                text = f"{where}: other processes have {in_use / 1e9:.1f} GB of its memory"
                yield Finding(WARNING, text)


def find_unreachable(failed: Mapping[str, list[str]], machines: int) -> Iterator[Finding]:
    """`failed`: machine → machines to which it found no connection."""
    counts = Counter(node for one, others in failed.items() for node in (one, *others))
    while failed := {one: others for one, others in failed.items() if others}:
        worst = max(counts, key=lambda node: counts[node])
        nobody = failed.pop(worst, [])
        others = list(dict.fromkeys([*nobody, *(one for one in failed if worst in failed[one])]))
        yield Finding(
            REFUSED,
            f"{worst}: no TCP connection with {_list(others)} → another cluster.interface, or the "
            "firewall",
            (worst,) if machines > 2 else (),
        )
        failed = {one: [each for each in found if each != worst] for one, found in failed.items()}
        counts = Counter(node for one, found in failed.items() for node in (one, *found))


def find_slow(what: str, seconds: Mapping[str, float]) -> Iterator[Finding]:
    """Machines that need longer than the others for the same work. `seconds`: of each machine."""
    for node, own in seconds.items():
        others = [value for name, value in seconds.items() if name != node]
        if not others or own <= SLOW_WARNING * median(others):
            continue
        text = f"{node}: {what} takes {own * 1e3:.1f} ms, elsewhere {median(others) * 1e3:.1f} ms"
        refused = own > SLOW_REFUSED * median(others)
        yield Finding(REFUSED if refused else WARNING, text, (node,))


def find_wrong_results(results: Mapping[str, tuple[str, str]]) -> Iterator[Finding]:
    """Ranks whose device computes other bits than others of the same kind.

    `results`: `node, rank N` → (kind of device, digest of its product).
    """
    kinds = defaultdict(list)
    for name, (kind, value) in results.items():
        kinds[kind].append((name, value))
    for kind, found in kinds.items():
        usual = Counter(value for _, value in found).most_common(1)[0][0]
        for name, value in found:
            if value != usual:
                node = name.partition(",")[0]
                text = f"{name}: a matrix product has other bits than on other ranks ({kind})"
                yield Finding(REFUSED, text, (node,))


def find_narrow(pairs: Mapping[tuple[str, str], float]) -> Iterator[Finding]:
    """Machines of which even the best pair is slow. `pairs`: two machines → bytes per second."""
    names = dict.fromkeys(name for pair in pairs for name in pair)
    best = {name: max(rate for pair, rate in pairs.items() if name in pair) for name in names}
    for node, own in best.items():
        others = [rate for name, rate in best.items() if name != node]
        if others and own < NARROW_WARNING * median(others):
            status = REFUSED if own < NARROW_REFUSED * median(others) else WARNING
            text = f"{node}: {own / 1e6:,.0f} MB/s with other machines, these among each other "
            yield Finding(status, f"{text}{median(others) / 1e6:,.0f}", (node,))


def find_wrong_clocks(clocks: Mapping[str, float]) -> Iterator[Finding]:
    """Machines whose clock is off. `clocks`: seconds since 1970, read at the same moment."""
    usual = median_low(clocks.values())
    for node, own in clocks.items():
        off = abs(own - usual)
        if off > CLOCK_WARNING:
            status = REFUSED if off > CLOCK_REFUSED else WARNING
            text = f"{node}: its clock is {off:,.1f} s off → chrony or ntpd"
            yield Finding(status, text, (node,))


def _list(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"
