"""Parts of tensors are gathered and written once each, in bounded messages, and agreed on once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp

from launcher.checkpoint import dcp
from launcher.checkpoint.dcp_writer import DcpWriter
from launcher.distributed import gather
from launcher.distributed.parts import choose
from launcher.distributed.process_group import RankInfo
from launcher.distributed.shards import Shard
from launcher.io.boxes import boxes
from tests.helpers.pool import message_of_error

SHAPES = {
    "matrix": (50, 30),
    "experts": (4, 9, 5),
    "vector": (7,),
    "scalar": (),
    "codes": (300,),
    "few": (1, 3),
}
DTYPES = {"codes": torch.uint8, "vector": torch.bfloat16}


def full(name: str) -> torch.Tensor:
    numbers = torch.arange(math.prod(SHAPES[name]))
    return numbers.to(DTYPES.get(name, torch.float32)).view(SHAPES[name])


def shard(name: str, number: int, shards: int) -> Shard:
    """One of `shards` flat ranges, which begin and end within rows."""
    values = full(name).flatten()
    each = -(-len(values) // shards)
    begin = min(number * each, len(values))
    return Shard(values[begin : begin + each].clone(), begin, SHAPES[name])


def shards_of(rank_info: RankInfo, replicas: int = 1) -> dict[str, Shard]:
    """This rank's shards, of `replicas` complete copies on all ranks."""
    shards = rank_info.world_size // replicas
    return {name: shard(name, rank_info.rank % shards, shards) for name in SHAPES}


def gathered(rank_info: RankInfo, replicas: int) -> tuple[bool, list[int]]:
    """Whether rank 0 has all tensors and the others none; the bytes of each message sent."""
    sent: list[int] = []
    original = dist.send

    def send(tensor: torch.Tensor, *args: Any, **options: Any) -> None:
        sent.append(tensor.nbytes)
        original(tensor, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "send", send)
        patch.setattr(gather, "MESSAGE_BYTES", 256)
        found = gather.gather_to_main(shards_of(rank_info, replicas))
    if not rank_info.is_main:
        return found is None, sent
    assert found is not None
    return all(torch.equal(found[name], full(name)) for name in SHAPES), sent


@pytest.mark.parametrize(("world", "replicas"), [(1, 1), (3, 1), (4, 2), (2, 2)])
def test_tensors_are_gathered_in_bounded_messages(ranks: Any, world: int, replicas: int) -> None:
    found = ranks.run(world, gathered, replicas)
    assert all(correct for correct, _ in found)
    messages = [nbytes for _, sent in found for nbytes in sent]
    assert max(messages, default=0) <= 256
    assert bool(messages) == (world > replicas), "nothing is sent of what rank 0 has"


def gather_half(rank_info: RankInfo) -> None:
    first = shard("codes", 0, 2)
    nothing = Shard(torch.empty(0, dtype=torch.uint8), 300, SHAPES["codes"])
    gather.gather_to_main({"codes": first if rank_info.is_main else nothing})


def test_a_part_that_no_rank_has_is_an_error_on_all_ranks(ranks: Any) -> None:
    for said in ranks.run(2, message_of_error, gather_half):
        assert said.endswith("ranks have 150 of the 300 elements of tensor 0")


def test_ranks_with_copies_share_the_work() -> None:
    layout = [boxes(0, 100, (10, 10))] * 8
    chosen = choose([layout] * 4, [(10, 10)] * 8, to_main=False)
    assert [sum(map(len, each)) for each in chosen] == [2, 2, 2, 2]
    chosen = choose([layout] * 4, [(10, 10)] * 8, to_main=True)
    assert [sum(map(len, each)) for each in chosen] == [8, 0, 0, 0]


def save_three_times(rank_info: RankInfo, folder: Path, replicas: int) -> list[int]:
    """How many objects are gathered in each of three saves, the third with other values."""
    writer, gathers = DcpWriter(None), []
    for number in range(3):
        shards = shards_of(rank_info, replicas)
        if number == 2:
            for each in shards.values():
                each.local.add_(1)
        tree = {"model": shards, "optimizer": {"exp_avg": shards}}
        at = folder / str(number)
        at.mkdir(parents=True, exist_ok=True)
        calls: list[object] = []
        original = dist.gather_object

        def counted(*args: Any, calls: Any = calls, original: Any = original, **kw: Any) -> None:
            calls.append(args)
            original(*args, **kw)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "gather_object", counted)
            writer.write(tree, at)
        gathers.append(len(calls))
    return gathers


@pytest.mark.parametrize(("world", "replicas"), [(1, 1), (3, 1), (4, 2), (2, 2)])
def test_ranks_agree_once_and_torch_reads_every_save(
    ranks: Any, tmp_path: Path, world: int, replicas: int
) -> None:
    for gathers in ranks.run(world, save_three_times, tmp_path, replicas):
        assert gathers == [2, 0, 0]
    metadata = {(tmp_path / str(number) / ".metadata").read_bytes() for number in range(3)}
    assert len(metadata) == 1
    for number, added in ((0, 0), (1, 0), (2, 1)):
        loaded = {
            f"{prefix}.{name}": torch.zeros_like(full(name))
            for name in SHAPES
            for prefix in ("model", "optimizer.exp_avg")
        }
        torch_dcp.load(loaded, checkpoint_id=tmp_path / str(number))
        for key, tensor in loaded.items():
            assert torch.equal(tensor, full(key.rpartition(".")[2]) + added), key
    files = {file.name for file in (tmp_path / "2").iterdir()}
    assert len(files) == world + 1, "one file for each rank, and .metadata"
    written = sum(file.stat().st_size for file in (tmp_path / "2").glob("*.distcp"))
    (size,) = ranks.run(1, size_of_one_rank, tmp_path / "alone")
    assert written < 1.5 * size * max(1, world // replicas), "replicas are written once"


def size_of_one_rank(rank_info: RankInfo, folder: Path) -> int:
    save_three_times(rank_info, folder, 1)
    return (folder / "2/__0_0.distcp").stat().st_size


def read_on_other_ranks(rank_info: RankInfo, folder: Path) -> bool:
    shards = shards_of(rank_info)
    expected = {name: each.local.clone() for name, each in shards.items()}
    for each in shards.values():
        each.local.zero_()
    dcp.read({"model": shards}, folder)
    return all(torch.equal(shards[name].local, expected[name]) for name in SHAPES)


def test_other_ranks_read_their_parts(ranks: Any, tmp_path: Path) -> None:
    ranks.run(3, save_three_times, tmp_path, 1)
    assert all(ranks.run(4, read_on_other_ranks, tmp_path / "0"))


def write_to_a_full_disk(rank_info: RankInfo, folder: Path) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if rank_info.rank == 1:
            patch.setattr(torch, "save", fail)
        DcpWriter(None).write({"model": shards_of(rank_info)}, folder)


def test_a_full_disk_is_named_with_its_space(ranks: Any, tmp_path: Path) -> None:
    for said in ranks.run(2, message_of_error, write_to_a_full_disk, tmp_path):
        assert said.startswith("rank 1: OSError: [Errno 28] No space left on device (")
        assert said.endswith(" MB free on its disk)")
