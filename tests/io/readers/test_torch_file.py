"""torch.save files are read exactly, tile by tile, and nothing in them is executed."""

from __future__ import annotations

import builtins
import os
import pickle
import zipfile
from argparse import Namespace
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from launcher.errors import UserError
from launcher.io.readers.strided import Strided
from launcher.io.readers.torch_file import read_file
from launcher.io.tensor.stored import Stored

WEIGHT = torch.randn(30, 20).bfloat16()
CUBE = torch.randn(3, 8, 6)
MATRIX = torch.arange(35 * 11).view(35, 11)
CONTIGUOUS = {
    "plain": WEIGHT,
    "part": WEIGHT[3:9],
    "scalar": torch.tensor(7),
    "fp8": torch.randn(4, 4).to(torch.float8_e4m3fn),
    "unsigned": torch.arange(5).to(torch.uint16),
    "flags": torch.tensor([True, False]),
    "parameter": nn.Parameter(torch.ones(3)),
    "buffer": nn.Buffer(torch.ones(2)),
    "empty": torch.empty(0, 4),
}
VIEWS = {
    "transposed": MATRIX.t(),
    "transposed cube": CUBE.transpose(1, 2),
    "permuted": CUBE.permute(2, 0, 1),
    "some columns": MATRIX[:, 3:9],
    "every other": MATRIX[::2, ::3],
    "one column": MATRIX[:, 1],
    "expanded": torch.tensor(3.5).expand(4, 5),
}


def test_contiguous_tensors_are_ranges_of_the_file(tmp_path: Path) -> None:
    torch.save(CONTIGUOUS, tmp_path / "a.pt")
    found = read_file(tmp_path / "a.pt")
    for name, tensor in CONTIGUOUS.items():
        assert isinstance(found[name], Stored)
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].read_all(), tensor), name


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_read_in_tiles_of_any_size_by_both_implementations(
    tmp_path: Path, name: str
) -> None:
    view = VIEWS[name]
    torch.save(view, tmp_path / "a.pt")
    found = read_file(tmp_path / "a.pt")
    assert isinstance(found, Strided)
    assert torch.equal(found.read_all(), view)
    matrix = view.reshape(found.rows, found.columns)
    for first, last in ((0, 1), (1, found.rows), (found.rows // 2, found.rows)):
        assert torch.equal(found.read(first, last), matrix[first:last])
        assert torch.equal(found.reference(first, last).double(), matrix[first:last].double())


def test_an_archive_inside_a_file_is_read(tmp_path: Path) -> None:
    torch.save(WEIGHT, tmp_path / "a.pt")
    data = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "b").write_bytes(b"x" * 37 + data + b"y" * 11)
    assert torch.equal(read_file(tmp_path / "b", 37, len(data)).read_all(), WEIGHT)


def test_an_archive_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": WEIGHT}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_file(tmp_path / "a.pt")["a"].read_all(), WEIGHT)


def test_a_legacy_file_is_read(tmp_path: Path) -> None:
    content = {"a": WEIGHT, "b": WEIGHT.t(), "n": [3, {"c": torch.ones(2)}]}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    found = read_file(tmp_path / "a.pt")
    assert isinstance(found["a"], Stored)
    assert torch.equal(found["a"].read_all(), WEIGHT)
    assert torch.equal(found["b"].read_all(), WEIGHT.t())
    assert torch.equal(found["n"][1]["c"].read_all(), torch.ones(2))


def test_other_contents_stay_or_become_inert(tmp_path: Path) -> None:
    content = {
        "step": 3,
        "shape": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "groups": OrderedDict(a={1, 2}, b=defaultdict(list, c=[1.5])),
        "options": Namespace(lr=0.1),
        "numpy": numpy.float32(2),
        "random": numpy.random.RandomState(0).get_state(),
        "device": torch.device("cpu"),
    }
    torch.save(content, tmp_path / "a.pt")
    found = read_file(tmp_path / "a.pt")
    assert {key: found[key] for key in ("step", "shape", "dtype", "groups")} == {
        "step": 3,
        "shape": (2, 3),
        "dtype": torch.bfloat16,
        "groups": content["groups"],
    }
    assert type(found["options"]).__name__ == "Inert"


def test_a_tensor_with_attributes_is_read_as_its_values(tmp_path: Path) -> None:
    tensor = torch.ones(4)
    tensor.ds_id = 3  # type: ignore[attr-defined]
    torch.save(tensor, tmp_path / "a.pt")
    assert torch.equal(read_file(tmp_path / "a.pt").read_all(), tensor)


class Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("function", "argument", "name"),
    [
        (os.system, "touch harmed", "system"),
        (builtins.eval, "open('harmed', 'w')", "eval"),
        (builtins.getattr, "os", "getattr"),
        (torch.load, "harmed", "load"),
        (nn.Linear, 3, "Linear"),
    ],
)
def test_harmful_pickles_are_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, legacy: bool, function: Any, argument: Any,
    name: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    content = {"a": Calls(function, argument)}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r"a\.pt" + ("" if legacy else f".*{name}")):
        read_file(tmp_path / "a.pt")
    assert not (tmp_path / "harmed").exists()


REBUILD = torch._utils._rebuild_tensor_v2
REST = (0, (8,), (1,), False, OrderedDict())


@pytest.mark.parametrize(
    "reduced",
    [
        (REBUILD, (Namespace(path="a", key="0", dtype=torch.uint8, begin=0, nbytes=99), *REST)),
        (REBUILD, (torch.ones(8).untyped_storage(), *REST), {"pieces": ()}),
    ],
    ids=["a forged storage", "a changed tensor"],
)
def test_a_tensor_of_another_file_cannot_be_forged(tmp_path: Path, reduced: Any) -> None:
    forged = Calls(None)
    forged.reduced = reduced
    torch.save({"a": forged}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt: a pickle"):
        read_file(tmp_path / "a.pt")


def test_reading_a_pickle_that_contains_itself_terminates(tmp_path: Path) -> None:
    loop: list[Any] = [torch.ones(2)]
    loop.append(loop)
    for _ in range(60):
        loop = [loop, loop]
    torch.save(loop, tmp_path / "a.pt")
    found = read_file(tmp_path / "a.pt")
    for _ in range(60):
        found = found[0]
    assert torch.equal(found[1][1][0].read_all(), torch.ones(2))


@pytest.mark.parametrize("keep", [3, 40, 700, -1])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "a.pt"
    torch.save(CONTIGUOUS, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"a\.pt"):
        read_file(file)


def rewritten(file: Path, **changes: bytes | None) -> Path:
    """The archive with entries changed or left out; compressed if there are no changes."""
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(file.with_name("b.pt"), "w") as new:
        for entry in old.namelist():
            data = changes.get(entry.split("/", 1)[1].replace("/", "_"), old.read(entry))
            if data is not None:
                kind = zipfile.ZIP_STORED if changes else zipfile.ZIP_DEFLATED
                new.writestr(entry, data, kind)
    return file.with_name("b.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "is compressed"),
        ({"data_0": None}, "contains no data of storage 0"),
        ({"data_0": b"short"}, "has 5 bytes"),
        ({"byteorder": b"big"}, "big-endian"),
        ({"data.pkl": pickle.dumps("x")[:-3]}, "is damaged"),
    ],
)
def test_damaged_archives_are_named(tmp_path: Path, changes: Any, message: str) -> None:
    torch.save({"a": WEIGHT}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=message):
        read_file(rewritten(tmp_path / "a.pt", **changes))


def test_a_large_archive_is_not_read_into_memory(tmp_path: Path) -> None:
    import tracemalloc

    torch.save({"a": torch.zeros(1 << 23)}, tmp_path / "a.pt")
    tracemalloc.start()
    read_file(tmp_path / "a.pt")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
