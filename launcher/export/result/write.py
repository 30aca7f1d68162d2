"""Write a plan: into a folder aside, file by file, checked, then one rename.

A journal beside the folder aside, `.NAME.partial`, lists its finished files. Whatever ends the
process, `--resume` goes on from there; the target is never seen half written.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import xxhash

from launcher import manifest, versions
from launcher.errors import UserError
from launcher.export.plan import Plan
from launcher.export.readers.safetensors_file import header, readable
from launcher.export.result import readback
from launcher.export.result.companions import MANIFEST, write_companions
from launcher.export.result.progress import Progress
from launcher.export.result.recompute import recompute
from launcher.export.result.sink import Sink
from launcher.export.tensor import Tensor
from launcher.export.tensor.stored import as_bytes
from launcher.export.tensor.tiles import refuse_overflow, tiles

TILE_BYTES = 4 << 20
WORKER_BYTES = 48 << 20  # two buffers, tiles, an adapter's factors
OURS_BYTES = 320 << 20  # the interpreter and torch

Entry = dict[str, Any]  # bytes, xxh3_128, tensors: name → xxh3_64


@dataclass(frozen=True)
class How:
    """What changes the way and never the bytes."""

    workers: int = 0  # files written at once; 0: as many as cores, up to 4
    memory: int = 512 << 20  # bytes of resident set to stay under
    direct: bool = True
    resume: bool = False
    overwrite: bool = False
    verify: bool = True

    @property
    def at_once(self) -> int:
        """Files written at once. Raises UserError when `memory` is not enough for one."""
        if self.memory < OURS_BYTES + WORKER_BYTES:
            raise UserError(
                f"--memory {self.memory} bytes: one file at a time needs "
                f"{(OURS_BYTES + WORKER_BYTES) >> 20}MiB"
            )
        wanted = self.workers or min(os.cpu_count() or 1, 4)
        return max(1, min(wanted, (self.memory - OURS_BYTES) // WORKER_BYTES))


@dataclass(frozen=True)
class Report:
    written: int  # bytes; less than the plan's where an export was resumed
    seconds: float  # writing them
    files: dict[str, Entry]


def write(plan: Plan, output: Path, how: How | None = None) -> Report:
    """Write the folder `output`. Raises UserError before the first byte when it cannot be."""
    how = how or How()
    refuse_target(plan, output, how)
    output.parent.mkdir(parents=True, exist_ok=True)
    aside, identity = partial_folder(output), plan.identity()
    with _journal(aside, identity, how) as journal:
        try:
            report = _write_files(plan, aside, journal, how)
            write_companions(plan, aside)
            if how.verify:
                _verify(plan, aside, report, how)
            if plan.identity() != identity:
                raise UserError(
                    f"a source of {output} changed while it was read; nothing was kept: run again"
                )
            _write_manifest(plan, aside, report.files)
        except (KeyboardInterrupt, SystemExit, OSError):
            raise  # what is finished stays, for --resume
        except BaseException:
            shutil.rmtree(aside)  # ours alone, and of no use
            journal_of(aside).unlink()
            raise
        for path in (aside, *aside.iterdir()):
            readable(path)
        _put_in_place(aside, output)
    return report


def partial_folder(output: Path) -> Path:
    return output.absolute().parent / f".{output.name}.partial"


def journal_of(aside: Path) -> Path:
    return aside.with_name(aside.name + ".jsonl")


def refuse_target(plan: Plan, output: Path, how: How) -> None:
    """Raises UserError for a target in use, one that holds a source, and a disk without room."""
    if not output.name or output.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f"--output {output} is where you stand; name a folder in it")
    source = plan.source
    inputs = [*plan.sources(), source.path, source.base, *source.adapters, *source.companions]
    for path in filter(None, inputs):
        for each in (path.absolute(), path.resolve()):
            if output.resolve() in (each, *each.parents) or output.absolute() in each.parents:
                raise UserError(f"--output {output} holds {path}, which is a source of this export")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not (how.overwrite and output.is_dir()):
            raise UserError(
                f"--output {output} exists and is not empty; name another folder, or add "
                "--overwrite"
            )
        if not (output / MANIFEST).is_file():
            raise UserError(
                f"--output {output} is no export of ours (it holds no {MANIFEST}); --overwrite "
                "replaces exports alone: remove it yourself, or name another folder"
            )
    there = next(folder for folder in output.absolute().parents if folder.exists())
    aside = partial_folder(output)
    standing = sum(file.stat().st_size for file in aside.iterdir()) if aside.is_dir() else 0
    free = shutil.disk_usage(there).free + standing
    if free < plan.nbytes * 1.01:
        raise UserError(
            f"--output {output} needs {plan.nbytes / 1e9:.1f} GB, {there} has {free / 1e9:.1f} GB"
        )


@contextmanager
def _journal(aside: Path, identity: str, how: How) -> Iterator[TextIO]:
    """The journal of a partial folder, new or to be gone on with, for this process alone."""
    if aside.exists() and not (how.resume or how.overwrite):
        raise UserError(
            f"an unfinished export stands in {aside}: --resume goes on with it, --overwrite begins "
            "anew"
        )
    aside.mkdir(exist_ok=True)
    with journal_of(aside).open("a+", encoding="utf-8") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {aside}") from None
        if not _is_at(journal, journal_of(aside)):
            raise UserError(f"another process has just finished {aside}; look at what it wrote")
        journal.seek(0)
        begun = journal.readline().strip()
        if begun != identity:
            if begun and not how.overwrite:
                raise UserError(
                    f"{aside} was begun with other sources or options; --overwrite begins anew"
                )
            for path in aside.iterdir():
                path.unlink()
            journal.truncate(0)
            _note(journal, identity)
        yield journal


def _is_at(file: TextIO, path: Path) -> bool:
    """Whether `file`, open since before we had its lock, still has its name."""
    return path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino


def _finished(aside: Path, journal: TextIO) -> dict[str, Entry]:
    """The files that the journal says are whole. A last line cut short counts for nothing."""
    journal.seek(0)
    found: dict[str, Entry] = {}
    for line in journal.readlines()[1:]:
        try:
            entry = json.loads(line)
        except ValueError:
            break
        path = aside / entry.pop("name")
        if path.is_file() and path.stat().st_size == entry["bytes"]:
            found[path.name] = entry
    return found


def _note(journal: TextIO, line: str) -> None:
    journal.seek(0, os.SEEK_END)
    journal.write(line + "\n")
    journal.flush()
    os.fsync(journal.fileno())


def _write_files(plan: Plan, aside: Path, journal: TextIO, how: How) -> Report:
    files = _finished(aside, journal)
    shards = {plan.file_name(number): shard for number, shard in enumerate(plan.shards)}
    missing = {name: shard for name, shard in shards.items() if name not in files}
    for path in aside.iterdir():
        if path.name not in files:
            path.unlink()
    total = sum(tensor.nbytes for shard in missing.values() for tensor in shard)
    stop = threading.Event()
    with (
        Progress("writing", total) as progress,
        ThreadPoolExecutor(how.at_once, initializer=_alone) as pool,
    ):
        jobs = {
            pool.submit(_write_file, aside / name, shard, plan, progress, stop, how.direct): name
            for name, shard in missing.items()
        }
        try:
            for job in as_completed(jobs):
                files[jobs[job]] = job.result()
                _note(journal, json.dumps({"name": jobs[job], **job.result()}))
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return Report(total, progress.seconds, dict(sorted(files.items())))


def _alone() -> None:
    """A thread of the pool computes on one core: there are as many threads as cores."""
    torch.set_num_threads(1)


def _write_file(
    path: Path,
    tensors: list[Tensor],
    plan: Plan,
    progress: Progress,
    stop: threading.Event,
    direct: bool,
) -> Entry:
    """One safetensors file, a tile of a tensor in memory at a time."""
    hashes: dict[str, str] = {}
    with torch.inference_mode(), Sink(path, direct) as sink:
        head = header([(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors])
        sink.room(len(head)).copy_(torch.frombuffer(bytearray(head), dtype=torch.uint8))
        for tensor in tensors:
            digest = xxhash.xxh3_64()
            for first, last in tiles(tensor.rows, tensor.row_bytes, TILE_BYTES):
                if stop.is_set():
                    raise InterruptedError("another file failed")
                out = sink.room((last - first) * tensor.row_bytes).view(tensor.dtype)
                out = out.view(last - first, tensor.columns)
                tensor.fill(out, first)
                if tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
                    refuse_overflow(tensor.name, out, out)
                digest.update(as_bytes(out))
                progress.advance(out.nbytes)
            hashes[tensor.name] = digest.hexdigest()
        whole = sink.finish()
        return {"bytes": sink.bytes, "xxh3_128": whole, "tensors": hashes}


def _verify(plan: Plan, aside: Path, report: Report, how: How) -> None:
    """The disk is busy reading back while the processor computes again."""
    with ThreadPoolExecutor(1, initializer=_alone) as pool:
        again = pool.submit(recompute, plan, aside)
        readback.compare(aside, report.files, how.at_once)
        again.result()


def _write_manifest(plan: Plan, folder: Path, files: dict[str, Entry]) -> None:
    """What was made of what. No clock time: the same command gives the same bytes."""
    source = plan.source
    hashes = {name: value for entry in files.values() for name, value in entry["tensors"].items()}
    beside = manifest.entries(folder, lambda p: p.name not in (MANIFEST, *files))
    weights = {
        name: {key: value for key, value in entry.items() if key != "tensors"}
        for name, entry in files.items()
    }
    manifest.write(
        folder / MANIFEST,
        {
            "versions": versions.installed(),
            "source": {"kind": source.kind, "path": str(source.path)},
            "base": str(source.base) if source.base else None,
            "adapters": [str(adapter) for adapter in source.adapters],
            "read": {str(file): readback.fingerprint(file) for file in plan.sources()},
            "options": {key: str(value) for key, value in vars(plan.options).items()},
            "total_size": plan.nbytes,
            "notes": list(plan.notes),
            "tensors": {
                name: {"action": plan.actions[name], "xxh3_64": hashes[name]}
                for name in sorted(hashes)
            },
        },
        beside | weights,
    )


def _put_in_place(aside: Path, output: Path) -> None:
    """The rename. What `--overwrite` replaces is moved aside first and removed last."""
    old = output.absolute().parent / f".{output.name}.replaced"
    _sync(aside)
    if output.exists():
        shutil.rmtree(old, ignore_errors=True)  # of an export that was killed below
        output.rename(old)
    aside.rename(output)
    _sync(output.absolute().parent)
    journal_of(aside).unlink()
    if old.exists():
        shutil.rmtree(old)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
