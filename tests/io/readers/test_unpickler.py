"""A pickle executes nothing, and takes no more memory and time than its size allows."""

from __future__ import annotations

import gc
import pickle
import time
import tracemalloc
from collections import OrderedDict, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.errors import UserError
from launcher.io.readers.torch_file import read_file, unpickle
from tests.helpers import hostile

SECONDS, BYTES = 5, 100_000_000


@pytest.mark.parametrize("name", hostile.BOMBS)
def test_a_small_pickle_takes_neither_memory_nor_time(tmp_path: Path, name: str) -> None:
    file = tmp_path / "a.pkl"
    file.write_bytes(hostile.BOMBS[name])
    tracemalloc.start()
    started = time.monotonic()
    with suppress(UserError):  # some are honest
        unpickle(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - started < SECONDS * 4  # tracemalloc itself is slow
    assert peak < BYTES


@pytest.mark.parametrize(
    "write", [hostile.write_archive, hostile.write_legacy, hostile.write_nested, hostile.write_tar]
)
@pytest.mark.parametrize("name", hostile.pickles(Path("x")))
def test_no_format_executes_a_pickle(tmp_path: Path, name: str, write: Any) -> None:
    marker = tmp_path / "marker"
    write(tmp_path / "a.pt", hostile.pickles(marker)[name])
    with pytest.raises(UserError, match=r"a\.pt"):
        read_file(tmp_path / "a.pt")
    assert not marker.exists()


def test_the_attacks_are_attacks(tmp_path: Path) -> None:
    """Python's own unpickler executes them."""
    for number, name in enumerate(hostile.pickles(tmp_path)):
        marker = tmp_path / f"marker-{number}"
        pickle.loads(hostile.pickles(marker)[name])
        assert marker.exists(), name


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_is_read(tmp_path: Path, protocol: int) -> None:
    content = {
        "a": [1, -1, 2**40, 2**100, 1.5, True, None, "ü" * 300, b"\0" * 300, ()],
        "b": OrderedDict(x=(1, 2, 3, 4), y={1, 2}, z=frozenset({"a"})),
        "c": defaultdict(list, k=[torch.bfloat16, torch.Size([2, 3])]),
        ("a", 1): "tuple",
    }
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    found = unpickle(tmp_path / "a.pkl")
    assert found == content | {"c": {"k": [torch.bfloat16, (2, 3)]}}


def test_the_garbage_collector_is_on_again(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02N")
    with pytest.raises(UserError):
        unpickle(tmp_path / "a.pkl")
    assert gc.isenabled()
