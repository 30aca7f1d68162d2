"""A SOURCE from which nothing can be exported is refused with what it is and what to name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from launcher.errors import UserError
from launcher.export.source import find_source
from launcher.export.writing.write import WriteOptions, check_target
from tests.helpers.exports import plan_of

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 988097824\n"
SETTINGS = ("config.json", "tokenizer_config.json", "tokenizer.json")
# What is in the folder SOURCE (a name that ends in / is a folder), and what is said about it.
FOLDERS: dict[str, tuple[tuple[str, ...], str]] = {
    "empty": ((), "is empty → the folder with the weights"),
    "a config alone": (("config.json",), "contains a config.json alone → the folder with the"),
    "GGUF": (("a-Q4_K_M.gguf", "README.md"), r"contains a-Q4_K_M\.gguf: weights for llama\.cpp"),
    "GGUF with settings": (("a.gguf", *SETTINGS), r"contains a\.gguf: weights for llama\.cpp"),
    "ONNX": (("model.onnx", *SETTINGS), "weights for ONNX → those in safetensors"),
    "Flax": (("flax_model.msgpack", *SETTINGS), "weights for Flax.*from_flax=True"),
    "TensorFlow": (("tf_model.h5", *SETTINGS), "weights for Flax, TensorFlow.*from_tf=True"),
    "Meta's layout": (
        ("consolidated.00.pth", "params.json", "tokenizer.model"),
        "weights as Meta releases them → the same model in the layout of Hugging Face",
    ),
    "one .pth file": (("model.pth", *SETTINGS), r"model\.pth.*rename it to pytorch_model\.bin"),
    "Lightning": (("epoch=3-step=100.ckpt",), "beside the config.json of its model"),
    "a trainer's output": (
        ("checkpoint-9/config.json", "checkpoint-9/model.safetensors", "runs/events",
         "checkpoint-100/config.json", "checkpoint-100/model.safetensors", "train_results.json"),
        "the newest one, .*/checkpoint-100$",
    ),
    "a trainer's output with settings": (
        ("checkpoint-20/latest", "checkpoint-20/global_step20/x", *SETTINGS),
        "the newest one, .*/checkpoint-20$",
    ),
    "adapters of a trainer": (
        ("checkpoint-2/adapter_config.json", "checkpoint-2/adapter_model.safetensors"),
        "the newest one, .*/checkpoint-2$|choose one of them",
    ),
    "ZeRO without its pointer": (
        ("global_step8/mp_rank_00_model_states.pt", "zero_to_fp32.py"),
        "the newest one, .*/global_step8$",
    ),
    "accelerate's checkpoints": (
        ("checkpoints/checkpoint_1/config.json", "checkpoints/checkpoint_1/model.safetensors"),
        "the newest one, .*/checkpoints/checkpoint_1$",
    ),
    "optimizer alone": (
        ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "trainer_state.json"),
        r"the state of a trainer \(optimizer\.pt, rng_state_0\.pth, scheduler\.pt, …\) and no weig",
    ),
    "tokenizer alone": (SETTINGS[1:], "contains a tokenizer and no weights → the folder of the m"),
    "model without weights": (SETTINGS, "contains a tokenizer and no weights → the folder of the "),
    "archive": (("model.tar.gz", "notes"), r"model\.tar\.gz, an archive → unpack it"),
    "interrupted download": (
        (*SETTINGS, ".cache/huggingface/download/abc.incomplete"),
        "was not downloaded completely → the same download once more",
    ),
    "hub cache": (
        ("snapshots/0123abc/config.json", "refs/main", "blobs/1"),
        "a repository in the hub's cache → its snapshot .*/snapshots/0123abc$",
    ),
    "something else": (("n.md", "a.py"), r"contains nothing .*\(a\.py, n\.md\) → name a run"),
}  # fmt: skip


def fill(folder: Path, names: tuple[str, ...]) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_without_weights_is_described(kind: str, tiny: Path, tmp_path: Path) -> None:
    names, message = FOLDERS[kind]
    folder = fill(tmp_path / "source", names)
    if "config.json" in names:
        shutil.copy(tiny / "config.json", folder)
    with pytest.raises(UserError, match=rf"{folder} .*({message})"):
        plan_of(folder)


# Name of a file that is named as SOURCE → what is said.
FILES = {
    "a.gguf": r"not a folder: weights for llama\.cpp",
    "a.zip": "an archive → unpack it",
    "model.safetensors": "a file of a model → its folder, ",
    "config.json": "a file of a model → its folder, ",
    "notes.txt": "a file → name a run",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_not_a_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=FILES[name]):
        find_source(tmp_path / name)


def test_what_does_not_exist_is_a_hub_id_a_broken_link_or_a_typo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"hf download Qwen/Qwen3-8B --local-dir Qwen3-8B, and"):
        find_source(Path("Qwen/Qwen3-8B"))
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"link is a link to .*gone, which does not exist"):
        find_source(tmp_path / "link")
    with pytest.raises(UserError, match=rf"does not exist; {tmp_path} does →"):
        find_source(tmp_path / "gone/a/b")


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(UserError, match=rf"SOURCE {tmp_path} cannot be read: Permission denied →"):
        find_source(tmp_path)


def change_link(folder: Path, name: str = "model.safetensors") -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../blobs/abc")


def split(folder: Path) -> dict[str, list[str]]:
    """Write the weights as two files without an index: file → names of tensors."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {f"model-0000{n}-of-00002.safetensors": names[n - 1 :: 2] for n in (1, 2)}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    return parts


def lose_part(folder: Path) -> None:
    split(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def lose_indexed_part(folder: Path) -> None:
    weight_map = {name: file for file, names in split(folder).items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model-00002-of-00002.safetensors").unlink()


MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights": (
        lambda folder: (folder / "model.safetensors").write_text(POINTER),
        r"model\.safetensors is a pointer of git-LFS .* → git lfs pull",
    ),
    "tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text(POINTER),
        r"tokenizer\.json is a pointer of git-LFS",
    ),
    "vocabulary": (
        lambda folder: (folder / "tokenizer.model").write_text(POINTER),
        r"tokenizer\.model is a pointer of git-LFS",
    ),
    "torch file": (
        lambda folder: (
            (folder / "model.safetensors").rename(folder / "pytorch_model.bin").write_text(POINTER)
        ),
        r"pytorch_model\.bin is a pointer of git-LFS",
    ),
    "link": (change_link, r"model\.safetensors is a link to \.\./blobs/abc, which does not exist"),
    "link of the tokenizer": (
        lambda folder: change_link(folder, "tokenizer.json"),
        r"tokenizer\.json is a link to \.\./blobs/abc, which does not exist",
    ),
    "link in a subfolder": (
        lambda folder: change_link(folder, "1_Pooling/config.json"),
        r"1_Pooling/config\.json is a link to \.\./blobs/abc, which does not exist",
    ),
    "part": (lose_part, "00001-of-00002.safetensors is one of 2 files, and the others are missing"),
    "indexed part": (lose_indexed_part, r"is missing; .* \(1 of 2 files are missing\) → the same"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_whose_files_are_not_all_there(name: str, tiny: Path, tmp_path: Path) -> None:
    change, message = MODELS[name]
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    change(folder)
    with pytest.raises(UserError, match=message):
        plan_of(folder)


def test_an_output_that_cannot_be_made_is_refused_at_the_start(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match=rf"{tmp_path} is not writable for this user →"):
        check_target(plan_of(tiny), tmp_path / "out", WriteOptions())


def test_a_base_that_is_no_model_is_described(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fill(tmp_path / "base", ("a.gguf",))
    with pytest.raises(UserError, match=r"the base model .*/base contains a\.gguf: weights for"):
        find_source(adapter, base=str(folder))
    with pytest.raises(UserError, match=r"the base model .* is the adapter itself → name the mod"):
        find_source(adapter, base=str(adapter))

    def fail(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=r"base model a/b could not be .*: no network → a local fo"):
        find_source(adapter, base="a/b")
