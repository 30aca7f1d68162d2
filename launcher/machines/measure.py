"""What ranks measure together: connections, bandwidth, clocks, and a matrix product."""

from __future__ import annotations

import hashlib
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from launcher.errors import one_line

CONNECT_SECONDS = 5
PARTNERS = 64  # at most, to which a machine connects
ROUNDS = 16  # at most, in each of which a machine exchanges a message with another one
MESSAGE_BYTES, MESSAGES = 1 << 23, 4  # of a pair, of which the fastest counts
SUM_BYTES = 1 << 26  # of NCCL's sum
SEED = 26
CPU_SIZE, GPU_SIZE = 384, 4096  # of the square matrices
REPEATS = 12
PAIR_SECONDS = 60


@contextmanager
def listening(address: str) -> Iterator[int]:
    """The port at `address` where the kernel accepts connections during the block."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family, backlog=PARTNERS + 1) as server:
        yield server.getsockname()[1]


def find_unreachable(peers: Sequence[tuple[str, str, int]]) -> list[str]:
    """The names among `peers` (name, address, port) to which no connection can be made."""

    def fails(peer: tuple[str, str, int]) -> bool:
        try:
            socket.create_connection(peer[1:], timeout=CONNECT_SECONDS).close()
        except OSError:
            return True
        return False

    with ThreadPoolExecutor(PARTNERS) as pool:
        return [
            peer[0] for peer, failed in zip(peers, pool.map(fails, peers), strict=True) if failed
        ]


def partners(own: int, count: int) -> list[int]:
    """To whom machine `own` of `count` connects: everyone, or at most PARTNERS, evenly spread."""
    step = max(1, -(-(count - 1) // PARTNERS))
    return [(own + offset) % count for offset in range(1, count, step)]


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The matrix product that is compared and timed."""
    return left @ right


def time_product(device: torch.device) -> tuple[str, float]:
    """(digest of `product`, its shortest time in seconds), of the same matrices on every rank: fp32
    on CPU, bf16 on a GPU. With one thread on CPU: how many there are changes the order of sums."""
    on_gpu = device.type == "cuda"
    size, dtype = (GPU_SIZE, torch.bfloat16) if on_gpu else (CPU_SIZE, torch.float32)
    generator = torch.Generator().manual_seed(SEED)
    left, right = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in "ab")
    threads, times = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for _ in range(REPEATS):
            start = time.perf_counter()
            result = product(left, right)
            if on_gpu:
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    content = result.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(content).hexdigest()[:16], min(times)


def read_clock() -> float:
    """Seconds since 1970 on this machine, at the same moment on all ranks. Collective."""
    dist.barrier()
    return time.time()


def tournament(count: int) -> Iterator[list[tuple[int, int]]]:
    """The rounds in which each of `count` players meets each other once (circle method), at most
    ROUNDS of them."""
    players = [*range(count), *([-1] if count % 2 else [])]
    size = len(players)
    for _ in range(min(size - 1, ROUNDS)):
        pairs = [(players[at], players[size - 1 - at]) for at in range(size // 2)]
        yield [(min(pair), max(pair)) for pair in pairs if -1 not in pair]
        players[1:] = [players[-1], *players[1:-1]]


def time_pairs(leaders: Sequence[int]) -> tuple[dict[tuple[int, int], float], str]:
    """(bytes per second that this rank exchanged with others of `leaders`, in both directions at
    once, by the pairs' positions in `leaders`; why a message did not arrive, or empty). Collective:
    all ranks."""
    group = dist.new_group(list(leaders), timeout=timedelta(seconds=PAIR_SECONDS), backend="gloo")
    rates: dict[tuple[int, int], float] = {}
    problem, rank = "", dist.get_rank()
    try:
        for pairs in tournament(len(leaders)) if rank in leaders else ():
            for pair in pairs:
                if (own := list(leaders).index(rank)) in pair:
                    other = leaders[pair[0] + pair[1] - own]
                    _exchange(other, 1, group)  # makes the connection
                    times = [_exchange(other, MESSAGE_BYTES, group) for _ in range(MESSAGES)]
                    rates[pair] = MESSAGE_BYTES / min(times)
    except RuntimeError as error:
        problem = one_line(error)
    dist.barrier()
    if rank in leaders:
        dist.destroy_process_group(group)
    return rates, problem


def _exchange(other: int, nbytes: int, group: dist.ProcessGroup) -> float:
    """The seconds in which this rank and `other` send each other `nbytes`."""
    sent = torch.zeros(nbytes, dtype=torch.uint8)
    received = torch.empty_like(sent)
    start = time.perf_counter()
    works = [dist.isend(sent, other, group=group), dist.irecv(received, other, group=group)]
    for work in works:
        assert work is not None
        work.wait()
    return time.perf_counter() - start


def time_all_reduce(device: torch.device) -> tuple[bool, float]:
    """(whether NCCL's sum over all ranks is right, its seconds), of SUM_BYTES. Collective."""
    values = torch.ones(SUM_BYTES // 4, device=device)
    dist.all_reduce(values)  # makes the connections
    values.fill_(1)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    dist.all_reduce(values)
    torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    return bool((values == dist.get_world_size()).all()), seconds
