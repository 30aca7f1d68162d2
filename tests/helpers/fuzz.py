"""`python -m tests.helpers.fuzz SEEDS COUNT`: damages copies of model folders, and reads them.

SEEDS contains one folder for each kind of source. Each mutation of a copy must give the same
result or a sentence, without a traceback, in less than a second or two and without much memory. The
last line of stdout is a JSON list of those that did not.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from launcher.chat.target import find_target
from launcher.checkpoint import dcp
from launcher.distributed.shards import Shard
from launcher.errors import UserError
from launcher.export.plan import make_plan
from launcher.export.source import find_source
from launcher.folders import manifest
from launcher.folders.checkpoint import MANIFEST
from launcher.folders.model import CONFIG
from launcher.folders.tensor_entries import read_header

SECONDS, KILOBYTES = 10, 1 << 20  # of one mutation
WEIGHTS = (".safetensors", ".bin", ".pt", ".distcp")
VALUES: tuple[Any, ...] = (
    None, "x", "", -1, 1.5, True, [], {}, 2**70, [[1]], {"a": {}}, "../../etc/passwd", "/x",
)  # fmt: skip
Tensors = dict[str, torch.Tensor]


@dataclass
class Mutation:
    text: str  # what was done
    touched: tuple[Path, int, int] | None = None  # the bytes [begin, end) of a file that changed
    of_values: bool = False  # a value of a JSON file has another type
    refreshed: bool = False  # checksums were made anew


def read(folder: Path) -> Tensors:
    """All tensors of the model that consolidation would write, and of a DCP folder what resuming
    reads."""
    base = folder.parent / "base" if (folder / "adapter_config.json").is_file() else None
    plan = make_plan(find_source(folder, base=str(base) if base else None))
    tensors = {tensor.name: tensor.read_all() for tensor in plan.tensors}
    if (folder / CONFIG).is_file() or base:
        with suppress(UserError):
            find_target(folder, base)
    if (folder / ".metadata").is_file():
        for name, tensor in tensors.items():
            local = torch.full((tensor.numel(),), torch.nan)
            tree = {"model": {name: Shard(local, 0, tuple(tensor.shape))}}
            dcp.read_shards(tree, folder)
            assert torch.equal(local.view(tensor.shape), tensor), name
    return tensors


def flip(file: Path, rng: random.Random) -> Mutation:
    data = bytearray(file.read_bytes())
    at = rng.randrange(min(len(data), rng.choice([200, 4000, len(data)])))
    bit = rng.randrange(8)
    data[at] ^= 1 << bit
    file.write_bytes(data)
    return Mutation(f"bit {bit} of byte {at}", (file, at, at + 1))


def truncate(file: Path, rng: random.Random) -> Mutation:
    data = file.read_bytes()
    size = rng.randrange(len(data))
    file.write_bytes(data[:size])
    return Mutation(f"{size} of {len(data)} bytes")


def splice(file: Path, rng: random.Random) -> Mutation:
    data = bytearray(file.read_bytes())
    at, count = rng.randrange(len(data)), rng.choice([1, 4, 8])
    data[at : at + count] = rng.choice([rng.randbytes(count), b"\xff" * count, b"\0" * count])
    file.write_bytes(data)
    return Mutation(f"{count} bytes at {at}", (file, at, at + count))


def insert(file: Path, rng: random.Random) -> Mutation:
    data = bytearray(file.read_bytes())
    at, count = rng.randrange(len(data)), rng.choice([1, 8, 100])
    data[at:at] = rng.randbytes(count)
    file.write_bytes(data)
    return Mutation(f"{count} more bytes at {at}", (file, at, len(data)))


def delete(file: Path, rng: random.Random) -> Mutation:
    file.unlink()
    return Mutation("deleted")


def swap(file: Path, rng: random.Random) -> Mutation:
    others = [path for path in sorted(file.parent.iterdir()) if path.is_file() and path != file]
    others = [path for path in others if path.suffix == file.suffix]
    if not others:
        return truncate(file, rng)
    other = rng.choice(others)
    mine, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(mine)
    return Mutation(f"swapped with {other.name}", (file, 0, len(theirs)))


def retype(file: Path, rng: random.Random) -> Mutation:
    """A value of a JSON file, or of a safetensors header, is deleted or of another type."""
    data = file.read_bytes()
    is_header = file.suffix == ".safetensors"
    if not is_header and file.suffix != ".json":
        return flip(file, rng)
    length = struct.unpack("<Q", data[:8])[0] if is_header else 0
    content = json.loads(data[8 : 8 + length] if is_header else data)
    where, key = _random_place(content, rng)
    if rng.random() < 0.2 and isinstance(where, dict):
        text = f"{key} deleted"
        del where[key]
    else:
        where[key] = rng.choice(VALUES)
        text = f"{key} = {where[key]!r:.60}"
    encoded = json.dumps(content).encode()
    if rng.random() < 0.1:
        encoded, text = encoded.replace(b":", b":" + b"[" * 50_000, 1), "nested deeply"
    head = struct.pack("<Q", len(encoded)) if is_header else b""
    file.write_bytes(head + encoded + (data[8 + length :] if is_header else b""))
    return Mutation(text, of_values=True)


def _random_place(content: Any, rng: random.Random) -> tuple[Any, Any]:
    places = []
    pending = [content]
    while pending:
        node = pending.pop()
        children = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in children:
            places.append((node, key))
            if isinstance(value, dict | list):
                pending.append(value)
    return rng.choice(places)


MUTATIONS: tuple[Callable[[Path, random.Random], Mutation], ...] = (
    flip, flip, flip, truncate, splice, insert, delete, swap, retype, retype, retype,
)  # fmt: skip


def mutate(folder: Path, rng: random.Random) -> Mutation:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    small = [path for path in files if path.suffix not in WEIGHTS]
    file = rng.choice(rng.choice([files, small or files]))
    mutation = rng.choice(MUTATIONS)(file, rng)
    mutation.text = f"{file.relative_to(folder)}: {mutation.text}"
    if (folder / MANIFEST).is_file() and file.name != MANIFEST and rng.random() < 0.8:
        said = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).unlink()
        manifest.write(folder / MANIFEST, said)
        mutation.refreshed = True
    return mutation


def problem(mutation: Mutation, whole: Tensors, found: Tensors) -> str | None:
    """How a result differs from that of the undamaged folder in more than what was damaged."""
    if {n: t.shape for n, t in found.items()} != {n: t.shape for n, t in whole.items()}:
        return "other names or shapes"
    differing = [n for n in whole if not _same(whole[n], found[n])]
    if mutation.of_values and differing:
        return f"other values of {differing[:3]}"
    if mutation.touched is not None and mutation.touched[0].suffix == ".safetensors":
        file, begin, end = mutation.touched
        entries = read_header(file).entries.values()
        damaged = [entry for entry in entries if entry.begin < end and begin < entry.end]
        if len(differing) > len(damaged):
            return f"{len(damaged)} tensors were damaged, {len(differing)} differ"
    return None


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8)
    )


def outcome(whole: Tensors, work: Path, mutation: Mutation) -> str | None:
    """What is wrong with reading the folder; None if it gave the same result, or a sentence."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    signal.alarm(2 * SECONDS)
    try:
        found = read(work)
        wrong = problem(mutation, whole, found)
    except UserError as error:
        wrong = None if 20 < len(str(error)) < 2000 else f"not a sentence: {error!s:.300}"
    except BaseException:
        wrong = traceback.format_exc(limit=-4)
    finally:
        signal.alarm(0)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    if grown > KILOBYTES:
        return f"{grown >> 10} MB"
    if time.monotonic() - started > SECONDS:
        return f"{time.monotonic() - started:.0f} s"
    return wrong


def main() -> None:
    seeds, count = Path(sys.argv[1]), int(sys.argv[2])
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("too slow")))
    torch.set_num_threads(1)
    kinds = sorted(path for path in seeds.iterdir() if path.name != "base")
    whole = {kind: read(kind) for kind in kinds}
    wrong = []
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "base").symlink_to(seeds / "base")
        for number in range(count):
            rng = random.Random(number)
            kind = kinds[number % len(kinds)]
            work = Path(temporary) / kind.name
            shutil.copytree(kind, work)
            mutation = mutate(work, rng)
            if (said := outcome(whole[kind], work, mutation)) is not None:
                wrong.append(f"{number} {kind.name}/{mutation.text}: {said}")
            shutil.rmtree(work)
    print(json.dumps({"wrong": wrong, "count": count}))


if __name__ == "__main__":
    main()
