"""`cluster.preflight=true`: compare the machines of a run before anything is loaded.

Every rank gathers facts, rank 0 compares them through the store, then all join the process group
and measure. All ranks raise the same error: UserError if the request is at fault, BadNode with the
machines' names if they are.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launcher.config import Config
from launcher.config.schema.cluster import SlurmConfig
from launcher.distributed.agreement import agree
from launcher.distributed.interface import Link
from launcher.distributed.process_group import RankInfo, init_process_group
from launcher.folders.run import RunDir
from launcher.io import network
from launcher.machines import compare, measure
from launcher.machines.facts import Facts, gather, node_name
from launcher.machines.findings import REFUSED, WARNING, Finding, raise_refused
from launcher.machines.space import find_missing_space

NOTE = "preflight"  # the file in the attempt's folder that every machine must see
NOTE_SECONDS = 5  # until another machine sees a new file


@dataclass(frozen=True)
class Preflight:
    """The preflight of one rank."""

    run: RunDir
    config: Config
    rank_info: RankInfo
    store: dist.Store
    link: Link
    log: Callable[[str], None]

    def agree(self, topic: str, said: Any, decide: Callable[[list[Any]], Any]) -> Any:
        """What rank 0 decides, as `agreement.agree`, with JSON values. Collective."""
        text = agree(
            *(self.store, self.rank_info.rank, self.rank_info.world_size, f"preflight/{topic}"),
            json.dumps(said),
            lambda texts: json.dumps(decide([json.loads(each) for each in texts])),
            self.config.launch.rendezvous_minutes,
        )
        return json.loads(text)

    def end_if_refused(self, findings: list[Finding], facts: list[Facts]) -> None:
        """Log the warnings. Raises UserError on all ranks, if all have the same `findings`."""
        for each in findings:
            if each.status == WARNING:
                self.log(f"preflight: warning: {each.text}")
        cluster = self.config.cluster
        excluded = cluster.exclude if isinstance(cluster, SlurmConfig) else None
        raise_refused(findings, len({each.node for each in facts}), excluded)


def run_preflight(preflight: Preflight) -> None:
    """Compare, connect and measure; join the process group. Collective.

    Raises UserError on all ranks, BadNode if single machines are at fault.
    """
    start = time.monotonic()
    facts = _compare_facts(preflight)
    minutes = preflight.config.launch.collective_minutes
    init_process_group(preflight.rank_info, preflight.store, minutes)
    measured = _measure(preflight, facts)
    ranks, machines = preflight.rank_info.world_size, len(facts)
    counted = f"{ranks} rank{'s' * (ranks > 1)} on {machines} machine{'s' * (machines > 1)}"
    seconds = time.monotonic() - start
    preflight.log(f"preflight: {counted}, {', '.join(measured)} ({seconds:.1f} s)")


def _compare_facts(preflight: Preflight) -> list[Facts]:
    """The facts of the first rank of each machine, which agree and can connect."""
    rank_info, note = preflight.rank_info, preflight.run.logs / NOTE
    with ExitStack() as held:
        name = preflight.agree("note", None, lambda _: _write_note(note))
        said = _gather(preflight, name, held) if rank_info.local_rank == 0 else None
        said_by_all = preflight.agree("facts", said and asdict(said), lambda texts: texts)
        facts = [Facts.from_dict(each) for each in said_by_all if each]
        findings = list(compare.find_differences(facts))
        if rank_info.is_main:
            note.unlink(missing_ok=True)
            findings += find_missing_space(preflight.config, preflight.run.checkpoints)
        # Only rank 0 knows its disk, so its findings are those of all.
        decided = preflight.agree(
            "findings", [asdict(each) for each in findings], lambda said: said[0]
        )
        preflight.end_if_refused([Finding.from_dict(each) for each in decided], facts)
        failed = _find_unreachable(said, facts) if said else []
        found = preflight.agree("reached", [node_name(), failed], lambda pairs: pairs)
    unreached = {node: names for node, names in found if names}
    preflight.end_if_refused(list(compare.find_unreachable(unreached, len(facts))), facts)
    return facts


def _write_note(file: Path) -> str:
    name = uuid.uuid4().hex
    file.write_text(name, encoding="ascii")
    return name


def _gather(preflight: Preflight, note: str, held: ExitStack) -> Facts:
    """The facts of this machine. While `held` is open, it listens for connections."""
    link, run = preflight.link, preflight.run
    is_shared = preflight.config.launch.shared_disk
    port = 0
    if link.address and not network.is_loopback(link.address):
        port = held.enter_context(measure.listening(link.address))
    return Facts(
        rank=preflight.rank_info.rank,
        node=node_name(),
        sees_note=not is_shared or _sees_note(run.logs / NOTE, note),
        interface=link.interface,
        address=link.address,
        port=port,
        **gather(preflight.config, run.config),
    )


def _find_unreachable(own: Facts, facts: list[Facts]) -> list[str]:
    """The machines to which this one finds no connection."""
    at = [each.rank for each in facts].index(own.rank)
    others = [facts[index] for index in measure.partners(at, len(facts))]
    listening = [(each.node, each.address, each.port) for each in others if own.port and each.port]
    return measure.find_unreachable(listening)


def _sees_note(file: Path, name: str) -> bool:
    """Whether `file` has this content, or gets it within NOTE_SECONDS (NFS is late)."""
    end = time.monotonic() + NOTE_SECONDS
    while True:
        with suppress(OSError):
            list(file.parent.iterdir())  # NFS remembers that a file did not exist
            if file.read_text(encoding="utf-8", errors="replace") == name:
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


@dataclass(frozen=True)
class Measured:
    """What one rank has measured."""

    node: str
    kind: str  # of its device: the same kind computes the same bits
    product: str  # its digest
    seconds: float  # of the product
    sum_is_right: bool  # of NCCL; true without it
    reduced: float  # seconds of NCCL's all_reduce; 0 without it
    rates: dict[tuple[int, int], float]  # bytes per second, by positions among the leaders
    problem: str  # why there are no rates
    clock: float  # seconds since 1970


def _measure(preflight: Preflight, facts: list[Facts]) -> list[str]:
    """What was measured, in words. Collective. Raises UserError on all ranks."""
    device = preflight.rank_info.device
    leaders = [each.rank for each in facts]
    value, seconds = measure.time_product(device)
    is_right, reduced = (True, 0.0)
    if device.type == "cuda":
        is_right, reduced = measure.time_all_reduce(device)
    rates, problem = measure.time_pairs(leaders) if len(leaders) > 1 else ({}, "")
    clock = measure.read_clock()
    own = Measured(
        node_name(), _kind(device), value, seconds, is_right, reduced, rates, problem, clock
    )
    everyone: list[Any] = [None] * preflight.rank_info.world_size
    dist.all_gather_object(everyone, own)
    measured = Summary.of(everyone, [each.node for each in facts])
    preflight.end_if_refused([*measured.findings(), *_failures(everyone)], facts)
    return measured.words()


@dataclass(frozen=True)
class Summary:
    """What all ranks have measured, by machine."""

    products: dict[str, tuple[str, str]]  # `node, rank N` → (kind of device, digest)
    times: dict[str, float]  # node → seconds of its slowest rank
    pairs: dict[tuple[str, str], float]  # two nodes → bytes per second
    clocks: dict[str, float]
    reduced: float  # seconds

    @classmethod
    def of(cls, everyone: list[Measured], nodes: list[str]) -> Summary:
        """`nodes`: the machines, in the order of their first ranks."""
        times: dict[str, float] = {}
        for each in everyone:
            times[each.node] = max(each.seconds, times.get(each.node, 0.0))
        return cls(
            {
                f"{each.node}, rank {at}": (each.kind, each.product)
                for at, each in enumerate(everyone)
            },
            times,
            {
                (nodes[one], nodes[other]): rate
                for each in everyone
                for (one, other), rate in each.rates.items()
            },
            {each.node: each.clock for each in everyone},
            max(each.reduced for each in everyone),
        )

    def findings(self) -> Iterator[Finding]:
        """Machines that compute wrongly, are slow, or whose clock is off."""
        yield from compare.find_wrong_results(self.products)
        yield from compare.find_slow("a matrix product", self.times)
        yield from compare.find_narrow(self.pairs)
        yield from compare.find_wrong_clocks(self.clocks)

    def words(self) -> list[str]:
        """For the log."""
        words = [f"product {max(self.times.values()) * 1e3:.1f} ms"]
        if self.pairs:
            spread = max(self.clocks.values()) - min(self.clocks.values())
            words.append(f"pairs {min(self.pairs.values()) / 1e6:,.0f} MB/s or more")
            words.append(f"clocks within {spread * 1e3:.0f} ms")
        if self.reduced:
            words.append(f"NCCL {measure.SUM_BYTES / self.reduced / 1e9:.1f} GB/s")
        return words


def _failures(everyone: list[Measured]) -> Iterator[Finding]:
    for at, each in enumerate(everyone):
        if not each.sum_is_right:
            text = f"{each.node}, rank {at}: NCCL's sum over all ranks is wrong"
            yield Finding(REFUSED, text, (each.node,))
        if each.problem:
            text = f"{each.node}: a message to another machine failed: {each.problem}"
            yield Finding(REFUSED, text, (each.node,))


def _kind(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.backends.cpu.get_cpu_capability()}"
