"""Damaged files of the cache are named and rebuilt, whatever is wrong with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.config.schema.data import DataConfig
from launcher.data import dataset
from launcher.data.dataset import TokenizedDataset, load_data
from launcher.data.streaming import open_files
from launcher.errors import UserError
from launcher.folders import checked_cache
from launcher.model.tiny import byte_tokenizer


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHARDWAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def content(data: TokenizedDataset) -> Any:
    rows = [data.rows[row] for row in range(len(data.rows))]
    return [(i.tolist(), mask.tolist()) for i, mask in rows], data.summaries, data.fingerprint


def flip(file: Path) -> None:
    """Change a byte in the middle, at the time of the last change."""
    times = file.stat()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def rewrite(file: Path, **changes: Any) -> None:
    """Change an index, with a right checksum."""
    facts = {**json.loads(file.read_text()), **changes}
    del facts["checksum"]
    file.write_text(json.dumps({**facts, "checksum": checked_cache._checksum_of(facts)}))


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a flipped bit": (".arrow", flip),
    "other bytes of the same size": (
        ".arrow", lambda file: file.write_bytes(b"\0" * file.stat().st_size)
    ),
    "cut": (".arrow", lambda file: file.write_bytes(file.read_bytes()[:-10])),
    "gone": (".arrow", lambda file: file.unlink()),
    "a flipped bit in the index": (".json", flip),
    "another number in the index": (
        ".json", lambda file: file.write_text(file.read_text().replace('"rows": 13', '"rows": 12'))
    ),
    "an empty index": (".json", lambda file: file.write_text("")),
    "a list as index": (".json", lambda file: file.write_text("[1]")),
    "bytes as index": (".json", lambda file: file.write_bytes(b"\xff\0")),
    "a number as text": (".json", lambda file: rewrite(file, rows="13")),
    "messages as a number": (".json", lambda file: rewrite(file, bad=3)),
    "notes as a list": (".json", lambda file: rewrite(file, notes=["x"])),
    "another size": (".json", lambda file: rewrite(file, nbytes=1)),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tokens_are_named_and_made_anew(
    rows_file: Path, own_cache: Path, damage: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config, said = DataConfig(path=str(rows_file), max_length=64), []
    before = content(load_data(config, byte_tokenizer(), say=said.append))
    assert said == []
    suffix, do = DAMAGES[damage]
    (file,) = own_cache.rglob(f"*{suffix}")
    do(file)
    age_all(own_cache)
    assert content(load_data(config, byte_tokenizer(), say=said.append)) == before
    (line,) = said
    assert str(file.with_suffix("")) in line
    assert line.endswith("; rebuilt")
    assert line in capfd.readouterr().err


def test_whole_files_that_were_swapped_are_named_and_rebuilt(
    rows_file: Path, own_cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    configs = [DataConfig(path=str(rows_file), max_length=length) for length in (64, 32)]
    whole = [content(load_data(config, byte_tokenizer())) for config in configs]
    one, other = sorted((own_cache / "tokens").glob("*.arrow"))
    for suffix in (".arrow", ".json"):
        pair = one.with_suffix(suffix), other.with_suffix(suffix)
        data = [file.read_bytes() for file in pair]
        for file, swapped in zip(pair, reversed(data), strict=True):
            file.write_bytes(swapped)
    age_all(own_cache)
    assert [content(load_data(config, byte_tokenizer())) for config in configs] == whole
    assert capfd.readouterr().err.count("two files were swapped; rebuilt") == 2


def age_all(folder: Path) -> None:
    """As if all files were of an earlier start: this process then does not trust them."""
    for file in folder.rglob("*.json"):
        os.utime(file, (1e9, 1e9))


def test_an_intact_file_is_read_once_per_start(
    rows_file: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, read, built = DataConfig(path=str(rows_file), max_length=64), [], []
    before = content(load_data(config, byte_tokenizer()))
    compare, build = checked_cache._compare, dataset._build
    monkeypatch.setattr(checked_cache, "_compare", lambda *a: read.append(a[0]) or compare(*a))
    monkeypatch.setattr(dataset, "_build", lambda *a: built.append(a) or build(*a))
    age_all(own_cache)
    for _ in range(3):
        assert content(load_data(config, byte_tokenizer())) == before
    assert (len(read), built) == (1, [])


def test_leftovers_of_a_killed_process_do_no_harm(rows_file: Path, own_cache: Path) -> None:
    config = DataConfig(path=str(rows_file), max_length=64)
    before = content(load_data(config, byte_tokenizer()))
    (file,) = own_cache.rglob("*.arrow")
    file.unlink()
    for suffix in (".partial", ".json.partial", ".lock"):
        file.with_suffix(suffix).write_bytes(b"left")
    assert content(load_data(config, byte_tokenizer())) == before
    assert {path.suffix for path in own_cache.rglob("*.*")} <= {
        ".arrow", ".json", ".lock", ".damaged"
    }  # fmt: skip


def test_an_index_of_an_earlier_version_is_replaced_without_a_word(
    rows_file: Path, own_cache: Path
) -> None:
    config, said = DataConfig(path=str(rows_file), max_length=64), []
    before = content(load_data(config, byte_tokenizer()))
    (index,) = own_cache.rglob("*.json")
    facts = json.loads(index.read_text())
    del facts["checksum"], facts["xxh3_128"]
    index.write_text(json.dumps(facts))
    assert content(load_data(config, byte_tokenizer(), say=said.append)) == before
    assert said == []
    assert "checksum" in json.loads(index.read_text())


@pytest.mark.parametrize("inside", ["", "tokens"])
def test_a_cache_that_is_a_file_is_refused_by_its_name(
    rows_file: Path, own_cache: Path, inside: str
) -> None:
    path = own_cache / inside
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("a file")
    config = DataConfig(path=str(rows_file), max_length=64)
    with pytest.raises(UserError, match=r"the cache .*cache.* cannot be written: .*SHARDWAY_CACHE"):
        load_data(config, byte_tokenizer())


DAMAGES_OF_LINES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a flipped bit": ("*.npy", flip),
    "no positions": ("*.npy", lambda file: file.write_bytes(b"")),
    "another hash": ("*.json", lambda file: file.write_text('{"content": "0", "checksum": "1"}')),
    "no hash": ("*.json", lambda file: rewrite(file, content=None)),
}


@pytest.mark.parametrize("damage", DAMAGES_OF_LINES)
def test_damaged_positions_of_lines_are_named_and_made_anew(
    rows_file: Path, own_cache: Path, damage: str
) -> None:
    config, said = DataConfig(path=str(rows_file), max_length=64), []
    (before,) = open_files(config)
    whole = [before[row] for row in range(len(before))]
    pattern, do = DAMAGES_OF_LINES[damage]
    (file,) = own_cache.rglob(pattern)
    do(file)
    age_all(own_cache)
    (after,) = open_files(config, said.append)
    assert [after[row] for row in range(len(after))] == whole
    assert after.content == before.content
    assert len(said) == 1
    assert file.stem in said[0]


TWO = """
import sys, time
from pathlib import Path
from launcher.folders import checked_cache
time.sleep(max(0.0, float(sys.argv[2]) - time.time()))
def make(partial):
    print("made", flush=True)
    time.sleep(0.5)
    partial.write_bytes(b"tokens")
    return {"rows": 1}
compare = checked_cache._compare
checked_cache._compare = lambda *a: print("read", flush=True) or compare(*a)
said = []
facts = checked_cache.ensure(Path(sys.argv[1]), make, lambda facts: facts["rows"], said.append)
print(facts["rows"], len(said))
"""


@pytest.mark.parametrize("damaged", [False, True])
def test_of_the_processes_of_a_start_one_reads_and_all_tell(tmp_path: Path, damaged: bool) -> None:
    file = tmp_path / "rows.arrow"
    checked_cache.ensure(file, lambda partial: {"rows": partial.write_bytes(b"tokens") // 6}, len)
    if damaged:
        file.write_bytes(b"Tokens")
    age_all(tmp_path)
    command = [sys.executable, "-c", TWO, str(file), str(checked_cache.time.time() + 2)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    lines = [process.communicate(timeout=120)[0].splitlines() for process in started]
    assert sum(line.count("read") for line in lines) == 1
    assert sum(line.count("made") for line in lines) == damaged
    assert [line[-1] for line in lines] == [f"1 {int(damaged)}"] * 3
    assert file.read_bytes() == b"tokens"
