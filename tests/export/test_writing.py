"""How a folder is written: caps, equal bytes, crashes, full disks, verification."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from launcher.errors import UserError
from launcher.export.shard_plan import assign_shards, natural_sort_key
from launcher.export.source import find_source
from launcher.export.verify import verify
from launcher.export.writing import direct_writer, journal, readback, recompute, write
from launcher.export.writing.journal import journal_path, partial_folder
from launcher.export.writing.write import WriteOptions
from launcher.io.readers.safetensors_file import data_ranges, header, read_header
from launcher.io.tensor import in_memory
from tests.helpers.exports import consolidate, contents, make_adapter, plan_of, stored


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_untied: Path) -> Path:
    return make_adapter(tiny_untied, tmp_path_factory.mktemp("adapters") / "lora")


class TestShards:
    def test_shards_equal_those_of_hugging_face(self) -> None:
        """Also in their order if one tensor is larger than the cap, or exactly as large."""
        dice = random.Random(3)
        for _ in range(200):
            tensors = {
                f"t{n:02d}": torch.zeros(dice.choice((1, 5, 30, 64, 200)), dtype=torch.uint8)
                for n in range(dice.randrange(1, 20))
            }
            theirs = split_torch_state_dict_into_shards(tensors, max_shard_size=64)
            ours = assign_shards((in_memory(n, t, Path()) for n, t in tensors.items()), 64)
            assert [[t.name for t in shard] for shard in ours] == list(
                theirs.filename_to_tensors.values()
            )

    def test_a_shard_may_be_exactly_as_large_as_the_cap(self, tiny: Path) -> None:
        total = plan_of(tiny).nbytes
        assert [len(plan_of(tiny, size).shards) for size in (total, total - 1)] == [1, 2]

    def test_layer_ten_comes_after_layer_two(self) -> None:
        assert natural_sort_key("layers.2.w") < natural_sort_key("layers.10.w")


class TestSink:
    @pytest.mark.parametrize("direct", [True, False])
    def test_any_sequence_of_sizes_is_written_correctly(self, tmp_path: Path, direct: bool) -> None:
        dice = random.Random(1)
        pieces = [dice.randbytes(dice.choice((1, 4096, 70_001, 9 << 20))) for _ in range(12)]
        with direct_writer.Sink(tmp_path / "file", direct) as out:
            for piece in pieces:
                out.reserve(len(piece)).copy_(torch.frombuffer(bytearray(piece), dtype=torch.uint8))
            out.finish()
        assert (tmp_path / "file").read_bytes() == b"".join(pieces)

    def test_an_existing_file_is_not_changed(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        with pytest.raises(FileExistsError):
            direct_writer.Sink(tmp_path / "file")
        assert (tmp_path / "file").read_text() == "mine"


class TestBytes:
    def test_bytes_are_the_same_with_all_options(
        self, tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan = plan_of(adapter, 20_000)
        assert len(plan.shards) > 3
        ways = {
            "one": WriteOptions(workers=1),
            "four": WriteOptions(workers=4),
            "buffered": WriteOptions(workers=2, direct=False),
            "thin": WriteOptions(workers=2),
        }
        for name, how in ways.items():
            monkeypatch.setattr(write, "TILE_BYTES", 100 if name == "thin" else 4 << 20)
            write.write(plan, tmp_path / name, how)
        expected = contents(tmp_path / "one")
        for name in ways:
            assert contents(tmp_path / name) == expected, name

    def test_bytes_are_the_same_on_a_memory_file_system(
        self, adapter: Path, tmp_path: Path
    ) -> None:
        there = Path("/dev/shm") / f"shardway-{os.getpid()}"
        try:
            write.write(plan_of(adapter), there)
            write.write(plan_of(adapter), tmp_path / "disk")
            assert contents(there) == contents(tmp_path / "disk")
        finally:
            shutil.rmtree(there, ignore_errors=True)

    def test_the_umask_decides_who_can_read_the_files(
        self, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The modes of the base's files and the umask of an interrupted export have no effect."""
        base = Path(shutil.copytree(tiny, tmp_path / "base"))
        for path in base.iterdir():
            path.chmod(0o600)
        before = os.umask(0o077)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(write, "write_extra_files", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    consolidate(base, "--output", tmp_path / "out")
            os.umask(0o027)
            consolidate(base, "--output", tmp_path / "out", "--resume")
        finally:
            os.umask(before)
        assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
        modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
        assert modes == {0o640}


def export_and_die(adapter: Path, output: Path, fatal: int) -> None:
    """Kill this process when it accesses the disk for the fatal-th time."""
    count = 0

    def dying(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    for name in ("pwrite", "fsync", "ftruncate"):
        setattr(os, name, dying(getattr(os, name)))
    for name in ("rename", "unlink", "mkdir", "write_text"):
        setattr(Path, name, dying(getattr(Path, name)))
    shutil.copyfile = dying(shutil.copyfile)
    write.write(plan_of(adapter, 40_000), output, WriteOptions(workers=2, overwrite=True))


class TestKilled:
    def test_an_export_killed_at_any_point_can_be_resumed(
        self, tmp_path: Path, adapter: Path
    ) -> None:
        plan = plan_of(adapter, 40_000)
        write.write(plan, tmp_path / "whole")
        expected = contents(tmp_path / "whole")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.export.test_writing"])
        fatal, resumed, exit_code = 1, 0, -signal.SIGKILL
        while exit_code == -signal.SIGKILL:
            output = tmp_path / f"out-{fatal}"
            process = context.Process(target=export_and_die, args=(adapter, output, fatal))
            process.start()
            process.join()
            exit_code = process.exitcode
            if partial_folder(output).exists():
                assert not output.exists(), "never both"
                write.write(plan, output, WriteOptions(resume=True))
                resumed += 1
            elif not output.exists():
                write.write(plan, output)
            assert contents(output) == expected, f"killed at the {fatal}th touch"
            shutil.rmtree(output)
            fatal += 1
        assert exit_code == 0
        assert resumed > 20

    def test_finished_files_are_not_written_again(
        self, tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plan, output = plan_of(adapter, 20_000), tmp_path / "out"
        with monkeypatch.context() as patch:
            patch.setattr(write, "write_extra_files", interrupted)
            with pytest.raises(KeyboardInterrupt):
                write.write(plan, output)
        with pytest.raises(UserError, match=r"--resume continues"):
            write.write(plan, output)
        with pytest.raises(UserError, match=r"other sources or options"):
            write.write(plan_of(adapter, 30_000), output, WriteOptions(resume=True))
        assert write.write(plan, output, WriteOptions(resume=True)).written == 0
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_journal_left_from_a_finished_export_is_ignored(
        self, tmp_path: Path, adapter: Path
    ) -> None:
        """It is left if the process is killed between the rename and the removal of the journal."""
        journal_path(partial_folder(tmp_path / "out")).write_text("another plan\n")
        write.write(plan_of(adapter), tmp_path / "out")
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_second_process_cannot_use_the_partial_folder(
        self, tmp_path: Path, adapter: Path
    ) -> None:
        aside = partial_folder(tmp_path / "out")
        with (
            journal.open_journal(aside, "mine", resume=False, overwrite=False),
            pytest.raises(UserError, match="another process is writing"),
        ):
            write.write(plan_of(adapter), tmp_path / "out", WriteOptions(resume=True))


class TestTwoAtOnce:
    def test_a_second_export_is_refused_until_the_rename(
        self, tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The lock is held until the folder has its final name."""
        plan, output = plan_of(adapter), tmp_path / "out"
        put, refused = write._put_in_place, []

        def late(aside: Path, target: Path) -> None:
            with pytest.raises(UserError, match="another process is writing") as error:
                write.write(plan, output, WriteOptions(overwrite=True))
            refused.append(error)
            put(aside, target)

        monkeypatch.setattr(write, "_put_in_place", late)
        write.write(plan, output)
        assert refused
        assert "whole" in verify(output)


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def touch(file: Path) -> None:
    """Set a later modification time; the bytes stay the same."""
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


def append_byte(file: Path) -> None:
    """Append a byte; the modification time stays the same."""
    stat = file.stat()
    file.write_bytes(file.read_bytes() + bytes(1))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


class TestRefusals:
    def test_nothing_is_overwritten_without_the_option(self, tmp_path: Path, tiny: Path) -> None:
        (tmp_path / "out").mkdir()
        consolidate(tiny, "--output", tmp_path / "out")
        with pytest.raises(UserError, match="exists and is not empty"):
            consolidate(tiny, "--output", tmp_path / "out")
        with pytest.raises(UserError, match="exists and is not empty"):
            consolidate(tiny, "--output", tmp_path / "out" / "config.json")
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes.txt").write_text("years of work")
        with pytest.raises(UserError, match="is not an export of Shardway"):
            consolidate(tiny, "--output", tmp_path / "mine", "--overwrite")
        (tmp_path / "mine" / "notes.txt").unlink()
        (tmp_path / "mine").rmdir()
        (tmp_path / "out" / "extra").touch()
        consolidate(tiny, "--output", tmp_path / "out", "--overwrite")
        assert not (tmp_path / "out" / "extra").exists()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_an_output_that_contains_a_source_is_refused(self, tmp_path: Path, tiny: Path) -> None:
        shutil.copytree(tiny, tmp_path / "models" / "base")
        with pytest.raises(UserError, match="which is a source of this export"):
            consolidate(
                tmp_path / "models" / "base", "--output", tmp_path / "models", "--overwrite"
            )

    def test_an_output_with_links_to_a_source_is_refused(self, tmp_path: Path, tiny: Path) -> None:
        """Like the hub's cache, where the files are stored elsewhere."""
        (tmp_path / "snapshot").mkdir()
        for file in tiny.iterdir():
            (tmp_path / "snapshot" / file.name).symlink_to(file)
        (tmp_path / "snapshot" / "consolidation_manifest.json").touch()
        with pytest.raises(UserError, match="which is a source of this export"):
            consolidate(tmp_path / "snapshot", "--output", tmp_path / "snapshot", "--overwrite")

    def test_an_output_that_is_a_link_is_written_to_its_target(
        self, tmp_path: Path, tiny: Path
    ) -> None:
        (tmp_path / "big").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "big")
        consolidate(tiny, "--output", tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert "whole" in verify(tmp_path / "big")

    def test_the_current_folder_is_refused_as_output(
        self, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for output in (".", "..", "/"):
            with pytest.raises(UserError, match="is the current folder"):
                consolidate(tiny, "--output", output)

    def test_too_little_memory_for_one_file_is_reported(self, tmp_path: Path, tiny: Path) -> None:
        with pytest.raises(UserError, match=r"--memory .* 368MiB"):
            consolidate(tiny, "--output", tmp_path / "out", "--memory", "1KB")

    def test_a_failure_leaves_nothing(
        self, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(write, "write_extra_files", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            consolidate(tiny, "--output", tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_a_model_with_nan_is_refused(self, tmp_path: Path, tiny: Path) -> None:
        """This also holds if all tensors are only copied."""
        base = Path(shutil.copytree(tiny, tmp_path / "base"))
        tensors = stored(base)
        tensors["model.norm.weight"][1:3] = float("nan")
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=r"model\.norm\.weight contains 2 NaN"):
            write.write(plan_of(base), tmp_path / "out", WriteOptions(verify=False))
        assert [path.name for path in tmp_path.iterdir()] == ["base"]

    def test_a_disk_that_is_too_small_is_detected_first(
        self, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(UserError, match=r"needs .* GB"):
            consolidate(tiny, "--output", tmp_path / "out")

    def test_an_export_can_be_resumed_after_the_disk_was_full(
        self, tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        small = tmp_path / "small"
        small.mkdir()
        options = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(small)]
        if os.geteuid() or subprocess.run(options, capture_output=True).returncode:
            pytest.skip("needs the right to mount a file system")
        try:
            plan = plan_of(adapter, 20_000)
            usage = shutil.disk_usage(tmp_path)._replace(free=10**9)
            monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
            with pytest.raises(OSError, match="No space"):
                write.write(plan, small / "out")
            subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
            assert (
                0
                < write.write(plan, small / "out", WriteOptions(resume=True)).written
                < plan.nbytes
            )
            assert "whole" in verify(small / "out")
        finally:
            subprocess.run(["umount", str(small)], check=True)


class TestVerification:
    @pytest.fixture
    def exported(self, tmp_path: Path, adapter: Path) -> Path:
        write.write(plan_of(adapter, 40_000), tmp_path / "out")
        return tmp_path / "out"

    def test_an_undamaged_folder_passes(self, exported: Path) -> None:
        assert "whole. 21 tensors" in verify(exported)

    def test_every_flipped_bit_is_found_and_located(self, exported: Path) -> None:
        dice = random.Random(0)
        for file in sorted(exported.glob("*.safetensors")):
            for name, (begin, end) in data_ranges(file).items():
                whole = file.read_bytes()
                damaged = bytearray(whole)
                damaged[dice.randrange(begin, end)] ^= 1 << dice.randrange(8)
                file.write_bytes(damaged)
                with pytest.raises(UserError, match=rf"{file.name} .* in {name} \(1 tensor"):
                    verify(exported)
                file.write_bytes(whole)
        assert "whole" in verify(exported)

    def test_damage_between_writing_and_renaming_is_found(
        self, tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def damage(plan: Any, folder: Path) -> None:
            with (folder / "model.safetensors").open("r+b") as file:
                file.seek(-9, os.SEEK_END)
                file.write(b"\x55")

        monkeypatch.setattr(write, "write_extra_files", damage)
        with pytest.raises(UserError, match="has changed since it was written"):
            write.write(plan_of(adapter), tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_files_are_read_back_while_the_next_ones_are_written(
        self, tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Only where writes bypass the page cache: other files are read in a pass of their own."""
        later: list[set[str]] = []
        compare = readback.compare_checksums

        def spy(folder: Path, files: Any, parallel_files: int) -> None:
            later.append(set(files))
            compare(folder, files, parallel_files)

        monkeypatch.setattr(readback, "compare_checksums", spy)
        plan = plan_of(adapter, 40_000)
        write.write(plan, tmp_path / "direct")
        write.write(plan, tmp_path / "cached", WriteOptions(direct=False))
        assert later == [set(), set(plan.files)]

    def test_a_disk_that_keeps_other_bytes_is_found(
        self, tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pwrite = os.pwrite

        def flip(file: int, data: memoryview, at: int) -> int:
            wrong = bytearray(data)
            wrong[9_000] ^= 1
            buffer = direct_writer._page_aligned(len(wrong))
            buffer.copy_(torch.frombuffer(wrong, dtype=torch.uint8))
            return pwrite(file, buffer.numpy().data, at)

        monkeypatch.setattr(os, "pwrite", lambda *a: (flip if len(a[1]) > 9_000 else pwrite)(*a))
        with pytest.raises(UserError, match=r"has changed since it was written, in .*weight"):
            write.write(plan_of(adapter), tmp_path / "out")

    def test_a_source_that_changes_during_the_export_is_found(
        self, tmp_path: Path, adapter: Path, tiny_untied: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The checksums agree in this case: only a second computation, which follows the writing of
        a file, finds the change."""
        base = tmp_path / "base"
        shutil.copytree(tiny_untied, base)
        plan = plan_of(adapter, base=str(base))
        file = base / "model.safetensors"
        changed = file.read_bytes()[: -(256 * 48 * 2)]

        def change() -> None:
            stat = file.stat()
            file.write_bytes(changed + os.urandom(stat.st_size - len(changed)))
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

        fill = write._fill

        def fill_and_change(*arguments: Any) -> Any:
            entry = fill(*arguments)
            change()
            return entry

        monkeypatch.setattr(write, "_fill", fill_and_change)
        with pytest.raises(UserError, match="differs from a second computation"):
            write.write(plan, tmp_path / "out")

    @pytest.mark.parametrize("change", [touch, append_byte])
    def test_a_source_that_changes_is_found_without_verification(
        self, tmp_path: Path, adapter: Path, tiny_untied: Path, monkeypatch: pytest.MonkeyPatch,
        change: Callable[[Path], None],
    ) -> None:  # fmt: skip
        """The change is found at the end of an export, and when an export is resumed."""
        base, options = Path(shutil.copytree(tiny_untied, tmp_path / "base")), {"verify": False}
        file, plan = base / "model.safetensors", plan_of(adapter, base=str(base))
        with monkeypatch.context() as patch:
            patch.setattr(write, "write_extra_files", lambda *_: change(file))
            with pytest.raises(UserError, match="changed while it was read; nothing was kept"):
                write.write(plan, tmp_path / "out", WriteOptions(**options))
            assert [path.name for path in tmp_path.iterdir()] == ["base"]
            patch.setattr(write, "write_extra_files", interrupted)
            with pytest.raises(KeyboardInterrupt):
                write.write(plan, tmp_path / "out", WriteOptions(**options))
        change(file)
        with pytest.raises(UserError, match="was started with other sources"):
            write.write(plan, tmp_path / "out", WriteOptions(resume=True, **options))

    def test_all_tensors_are_computed_again(self, tmp_path: Path, adapter: Path) -> None:
        plan = plan_of(adapter, 40_000)
        write.write(plan, tmp_path / "out", WriteOptions(verify=False))
        assert recompute.recompute(plan, tmp_path / "out") == 21

    @pytest.mark.parametrize(
        ("damage", "told"),
        [
            (lambda out: first_shard(out).write_bytes(first_shard(out).read_bytes()[:-3]), "bytes"),
            (lambda out: (out / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
            (lambda out: shutil.copy(first_shard(out), out / "b.safetensors"), r"b\.safetensors"),
            (lambda out: (out / "adapter_config.json").touch(), r"adapter_config\.json, not wri"),
            (lambda out: first_shard(out).unlink(), "is missing"),
            (lambda out: (out / "config.json").write_text("{}"), "config.json has"),
            (lambda out: flip_first_byte(first_shard(out)), "header"),
        ],
        ids=["cut", "no-tokenizer", "stray", "adapter", "no-shard", "config", "header"],
    )  # fmt: skip
    def test_other_damage_is_named(self, exported: Path, damage: Any, told: str) -> None:
        damage(exported)
        with pytest.raises(UserError, match=told):
            verify(exported)

    def test_a_folder_without_manifest_is_reported(self, tiny: Path) -> None:
        with pytest.raises(
            UserError, match=r"no consolidation_manifest\.json.*→ shardway consolidate"
        ):
            verify(tiny)

    def test_the_manifest_records_sources_and_actions(self, exported: Path, adapter: Path) -> None:
        manifest = json.loads((exported / "consolidation_manifest.json").read_text())
        assert manifest["adapters"] == [str(adapter)]
        read = {Path(name).name: entry for name, entry in manifest["read"].items()}
        assert read.keys() == {"model.safetensors", "adapter_model.safetensors"}
        file = adapter / "adapter_model.safetensors"
        assert read[file.name] == readback.fingerprint(file)
        actions = {entry["action"] for entry in manifest["tensors"].values()}
        assert len(actions) == 2
        assert manifest["tensors"].keys() == stored(exported).keys()


def flip_first_byte(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 255]) + content[1:])


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def test_a_damaged_safetensors_file_is_named(tmp_path: Path, tiny: Path) -> None:
    content = (tiny / "model.safetensors").read_bytes()
    file = tmp_path / "model.safetensors"
    for damaged in (content[:-7], content + b"x", content[:20], b"", b"\xff" * 100):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"model\.safetensors"):
            read_header(file)


def sparse_model(folder: Path, megabytes: int) -> Path:
    """A model folder of zeros that uses no disk space, and a rank-16 adapter on all its layers.

    One matrix [4096, 4096] in bf16 is 33.6 MB."""
    count = megabytes * 10**6 // (4096 * 4096 * 2)
    names = [f"model.layers.{n}.mlp.up_proj" for n in range(count)]
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header([(f"{name}.weight", torch.bfloat16, (4096, 4096)) for name in names]))
        file.truncate(file.tell() + count * 4096 * 4096 * 2)
    adapter = {}
    for name in names:
        adapter[f"base_model.model.{name}.lora_A.weight"] = torch.randn(16, 4096)
        adapter[f"base_model.model.{name}.lora_B.weight"] = torch.randn(4096, 16)
    (folder / "adapter").mkdir()
    save_file(adapter, folder / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": ["up_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return folder


PEAK = """
from launcher.commands.consolidate import main
main()
print("VmHWM", open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    peaks = []
    for megabytes in (300, 1500):
        model = sparse_model(tmp_path / str(megabytes), megabytes)
        words = [model, "--adapter", model / "adapter", "--output", model / "out"]
        words += ["--max-shard-size", "100MB", "--workers", "2"]
        command = [sys.executable, "-c", PEAK, *map(str, words)]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        peaks.append(int(out.split("VmHWM")[1]) * 1024)
        shutil.rmtree(model)
    assert max(peaks) < 512e6, peaks
    assert peaks[1] < peaks[0] * 1.1, peaks


def test_a_path_that_is_not_a_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for nothing in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="SOURCE"):
            find_source(nothing)
