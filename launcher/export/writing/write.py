"""Writes a plan: into a partial folder, file by file, verified, and then renamed.

A journal beside the partial folder `.NAME.partial` lists its finished files. If the process ends
early, `--resume` continues from there. The target is never incomplete.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
import xxhash

from launcher.errors import UserError
from launcher.export.plan import Plan
from launcher.export.writing import journal, readback
from launcher.export.writing.direct_writer import Sink
from launcher.export.writing.extra_files import write_extra_files
from launcher.export.writing.journal import Entry
from launcher.export.writing.progress import Progress
from launcher.export.writing.verification import Verification
from launcher.folders import durable, manifest, versions
from launcher.folders.model_files import EXPORT_MANIFEST as MANIFEST
from launcher.io.cpus import usable_cpus
from launcher.io.readers.safetensors_file import apply_umask, header
from launcher.io.tensor import Tensor
from launcher.io.tensor.stored import as_bytes
from launcher.io.tensor.tiles import refuse_overflow, tiles

TILE_BYTES = 4 << 20
WORKER_BYTES = 48 << 20  # two buffers, tiles, and an adapter's factors
PROCESS_BYTES = 320 << 20  # the interpreter and torch

Check = Callable[[str, bool], None]  # name of a finished file, whether it was read back meanwhile


@dataclass(frozen=True)
class WriteOptions:
    """Options that change how a folder is written, but not its bytes."""

    workers: int = 0  # files written in parallel; 0: one for each core, up to 4
    memory: int = 512 << 20  # upper limit of the resident set, bytes
    direct: bool = True
    resume: bool = False
    overwrite: bool = False
    verify: bool = True

    @property
    def parallel_files(self) -> int:
        """The number of files written in parallel. Raises UserError if `memory` is not enough for
        one."""
        if self.memory < PROCESS_BYTES + WORKER_BYTES:
            raise UserError(
                f"--memory {self.memory} bytes: one file at a time needs "
                f"{(PROCESS_BYTES + WORKER_BYTES) >> 20}MiB"
            )
        wanted = self.workers or min(usable_cpus(), 4)
        return max(1, min(wanted, (self.memory - PROCESS_BYTES) // WORKER_BYTES))


@dataclass(frozen=True)
class Report:
    written: int  # bytes; fewer than the plan's if an export was resumed
    seconds: float  # spent on writing them
    files: dict[str, Entry]


def write(plan: Plan, output: Path, options: WriteOptions | None = None) -> Report:
    """Write the folder `output`.

    Raises UserError if the target cannot be used, before the first byte; and if a source changes
    while it is read, or the verification fails.
    """
    options = options or WriteOptions()
    check_target(plan, output, options)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial, identity = journal.partial_folder(output), plan.identity()
    with journal.open_journal(partial, identity, options.resume, options.overwrite) as log:
        try:
            with closing(Verification(plan, partial, identity)) as verification:
                check = verification.add if options.verify else None
                report = _write_files(plan, partial, log, options, check)
                write_extra_files(plan, partial)
                if options.verify:
                    verification.finish(report.files, options.parallel_files)
            if plan.identity() != identity:
                raise UserError(
                    f"a source of {output} changed while it was read; nothing was kept: run again"
                )
            _write_manifest(plan, partial, report.files)
        except (KeyboardInterrupt, SystemExit, OSError):
            raise  # finished files are kept for --resume
        except BaseException:
            shutil.rmtree(partial)  # this process has the lock, and the files are of no use
            journal.journal_path(partial).unlink()
            raise
        for path in (partial, *partial.rglob("*")):
            apply_umask(path)
        _put_in_place(partial, output)
    return report


def check_target(plan: Plan, output: Path, options: WriteOptions) -> None:
    """Raises UserError if the target is in use or contains a source, or if the disk is too small
    for it."""
    if not output.name or output.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UserError(
            f"--output {output} is the current folder or one of its parents; name a folder in it"
        )
    source = plan.source
    inputs = [*plan.sources(), source.path, source.base, *source.adapters]
    inputs += source.extra_file_folders
    for path in filter(None, inputs):
        for location in (path.absolute(), path.resolve()):
            if (
                output.resolve() in (location, *location.parents)
                or output.absolute() in location.parents
            ):
                raise UserError(
                    f"--output {output} contains {path}, which is a source of this export"
                )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not (options.overwrite and output.is_dir()):
            raise UserError(
                f"--output {output} exists and is not empty; name another folder, or add "
                "--overwrite"
            )
        if not (output / MANIFEST).is_file():
            raise UserError(
                f"--output {output} is not an export of Shardway (it contains no {MANIFEST}); "
                "--overwrite replaces only exports: delete it yourself, or name another folder"
            )
    _check_free_space(plan, output)


def _check_free_space(plan: Plan, output: Path) -> None:
    parent = next(folder for folder in output.absolute().parents if folder.exists())
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(
            f"--output {output} cannot be made: {parent} is not writable for this user → an "
            "--output in another folder"
        )
    partial = journal.partial_folder(output)
    reusable = sum(file.stat().st_size for file in partial.iterdir()) if partial.is_dir() else 0
    free = shutil.disk_usage(parent).free + reusable
    if free < plan.nbytes * 1.01:
        raise UserError(
            f"--output {output} needs {plan.nbytes / 1e9:.3g} GB, and {parent} has "
            f"{free / 1e9:.3g} GB free → free some, or an --output on another disk"
        )


def _write_files(
    plan: Plan, partial: Path, log: TextIO, options: WriteOptions, check: Check | None
) -> Report:
    """Write the files that the journal does not list. `check` is called with each finished one."""
    files = journal.finished_files(partial, log)
    missing = {name: shard for name, shard in plan.files.items() if name not in files}
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in files:
            path.unlink()
    if check is not None:
        for name in files:
            check(name, False)
    total = sum(tensor.nbytes for shard in missing.values() for tensor in shard)
    stop = threading.Event()
    with (
        Progress("writing", total) as progress,
        ThreadPoolExecutor(options.parallel_files, initializer=_use_one_core) as pool,
    ):

        def write_file(name: str) -> Entry:
            with Sink(partial / name, options.direct, read_back=check is not None) as sink:
                entry = _fill(sink, missing[name], progress, stop)
            if check is not None:
                check(name, sink.is_read_back)
            return entry

        jobs = {pool.submit(write_file, name): name for name in missing}
        try:
            for job in as_completed(jobs):
                files[jobs[job]] = job.result()
                journal.append_line(log, json.dumps({"name": jobs[job], **job.result()}))
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return Report(total, progress.seconds, dict(sorted(files.items())))


def _use_one_core() -> None:
    """Each thread of the pool computes on one core: there are as many threads as cores."""
    torch.set_num_threads(1)


def _fill(sink: Sink, tensors: list[Tensor], progress: Progress, stop: threading.Event) -> Entry:
    """Write one safetensors file, with one tile of a tensor in memory at a time."""
    hashes: dict[str, str] = {}
    with torch.inference_mode():
        head = header([(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors])
        sink.reserve(len(head)).copy_(torch.frombuffer(bytearray(head), dtype=torch.uint8))
        for tensor in tensors:
            digest = xxhash.xxh3_64()
            for first, last in tiles(tensor.rows, tensor.row_bytes, TILE_BYTES):
                if stop.is_set():
                    raise InterruptedError("another file failed")
                out = sink.reserve((last - first) * tensor.row_bytes).view(tensor.dtype)
                out = out.view(last - first, tensor.columns)
                tensor.read_into(out, first)
                if _may_overflow(tensor):
                    refuse_overflow(tensor.name, out, out)
                digest.update(as_bytes(out))
                progress.advance(out.nbytes)
            hashes[tensor.name] = digest.hexdigest()
        file_hash = sink.finish()
        return {"bytes": sink.bytes, "xxh3_128": file_hash, "tensors": hashes}


def _may_overflow(tensor: Tensor) -> bool:
    """Whether values that are not finite have to be looked for: not where reading refuses them."""
    is_wide_float = tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1
    return is_wide_float and not tensor.refuses_overflow


def _write_manifest(plan: Plan, folder: Path, files: dict[str, Entry]) -> None:
    """Write what was made of which sources. It contains no time: the same command writes the same
    bytes."""
    source = plan.source
    hashes = {name: value for entry in files.values() for name, value in entry["tensors"].items()}
    weights_and_this = {folder / name for name in (MANIFEST, *files)}
    other_files = manifest.entries(folder, lambda path: path not in weights_and_this)
    weights = {
        name: {key: value for key, value in entry.items() if key != "tensors"}
        for name, entry in files.items()
    }
    manifest.write(
        folder / MANIFEST,
        {
            "versions": versions.installed_versions(),
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
        other_files | weights,
    )


def _put_in_place(partial: Path, output: Path) -> None:
    """Rename the folder. A folder that `--overwrite` replaces is renamed first and deleted last."""
    replaced = output.absolute().parent / f".{output.name}.replaced"
    for path in (*filter(Path.is_dir, partial.rglob("*")), partial):
        durable.sync(path)
    if output.exists():
        shutil.rmtree(replaced, ignore_errors=True)  # of an earlier export that was killed here
        output.rename(replaced)
    partial.rename(output)
    durable.sync(output.absolute().parent)
    journal.journal_path(partial).unlink()
    if replaced.exists():
        shutil.rmtree(replaced)
