"""Files that would execute something are given to every door: nothing runs, and each says so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp

from launcher.chat.model import ChatModel
from launcher.chat.target import find_target
from launcher.checkpoint import dcp
from launcher.commands.serve import model_folder
from launcher.config import store
from launcher.config.schema.model import ModelConfig
from launcher.data.files.arrow_files import read_arrow, read_parquet
from launcher.distributed.shards import Shard
from launcher.errors import UserError
from launcher.export.plan import make_plan
from launcher.export.source import find_source
from launcher.export.verify import verify
from launcher.method.existing_adapter import find_adapter, read_deltas
from launcher.model.load import build_model
from launcher.model.tokenizer import load_tokenizer
from launcher.ui.chat_models import base_folders
from tests.helpers import hostile

CONVERSATION = [{"role": "user", "content": "hi"}]


# Doors: each opens a folder, and says something or nothing.


def consolidate(folder: Path) -> None:
    plan = make_plan(find_source(folder))
    for tensor in plan.tensors:
        tensor.read_all()


def chat(folder: Path) -> None:
    for piece in ChatModel(find_target(folder)).stream(CONVERSATION):
        assert isinstance(piece, str)
        return


def resume(folder: Path) -> None:
    shard = Shard(torch.zeros(4), 0, (2, 2))
    dcp.read_shards({"model": {"a": shard}}, folder)


def train(folder: Path) -> None:
    load_tokenizer(folder, False)
    build_model(ModelConfig(name="x", name_or_path=str(folder)), folder, 0, torch.float32)


def page(folder: Path) -> None:
    list(base_folders(folder))
    find_target(folder)


def adapter(folder: Path) -> None:
    find_adapter(str(folder), "method.adapter")


def merge_first(folder: Path) -> None:
    read_deltas(str(folder))


DOORS: tuple[Callable[[Path], object], ...] = (
    consolidate, chat, resume, train, page, adapter, merge_first, verify, model_folder,
)  # fmt: skip


def open_every_door(folder: Path, marker: Path) -> list[str]:
    """What each door says. Nothing may create `marker`, and a door that opens says nothing."""
    said = []
    for door in DOORS:
        try:
            door(folder)
        except UserError as error:
            said.append(str(error))
            assert len(said[-1]) < 1500, said[-1]
        assert not marker.exists(), door.__name__
    return said


def _dcp(folder: Path) -> Path:
    torch_dcp.save({"model": {"a": torch.ones(2, 2)}}, checkpoint_id=folder)
    return folder


def _put_into(folder: Path, kind: str, data: bytes, base: Path) -> None:
    """A folder of this kind with `data` as one of its pickles."""
    if kind in ("metadata", "chunk"):
        _dcp(folder)
        shutil.copyfile(base / "config.json", folder / "config.json")
        if kind == "metadata":
            (folder / ".metadata").write_bytes(data)
        else:
            file = next(folder.glob("*.distcp"))
            size = file.stat().st_size
            hostile.write_archive(file, data)
            file.write_bytes(file.read_bytes().ljust(size, b"\0"))
        return
    shutil.copytree(base, folder)
    if kind != "beside":
        (folder / "model.safetensors").unlink()
    if kind in ("adapter", "adapter of old"):
        settings = {
            "peft_type": "LORA",
            "r": 2,
            "lora_alpha": 2,
            "base_model_name_or_path": str(base),
        }
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        write = hostile.write_legacy if kind == "adapter of old" else hostile.write_archive
        write(folder / "adapter_model.bin", data)
    elif kind == "zero":
        for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
            hostile.write_archive(folder / name, data)
    elif kind == "universal":
        (folder / "zero/a").mkdir(parents=True)
        hostile.write_archive(folder / "zero/a/fp32.pt", data)
        hostile.write_archive(folder / "mp_rank_00_model_states.pt", data)
    elif kind == "pickle as safetensors":
        (folder / "model.safetensors").write_bytes(data)
    elif kind == "beside":
        for name in ("optimizer.bin", "training_args.bin", "pytorch_model.bin", "scheduler.pt"):
            hostile.write_archive(folder / name, data)
    else:
        write = {"bin": hostile.write_archive, "legacy": hostile.write_legacy,
                 "nested": hostile.write_nested, "tar": hostile.write_tar,
                 "numpy": hostile.write_numpy}[kind]  # fmt: skip
        write(folder / "pytorch_model.bin", data)


FORMATS = (
    "metadata", "chunk", "bin", "legacy", "nested", "tar", "numpy", "adapter", "adapter of old",
    "zero", "universal", "pickle as safetensors", "beside",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMATS)
def test_no_door_executes_a_pickle(kind: str, tiny: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for number, data in enumerate(hostile.pickles(marker).values()):
        if number % len(FORMATS) and number > 2 and kind not in ("metadata", "bin"):
            continue  # how it is refused does not depend on the folder
        folder = tmp_path / f"{number}"
        _put_into(folder, kind, data, tiny)
        said = open_every_door(folder, marker)
        assert len(said) >= (5 if kind != "beside" else 3), said


@pytest.fixture
def evil(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the model, in the current folder of the process."""
    shutil.copytree(tiny, tmp_path / "evil")
    return tmp_path / "evil"


def test_no_door_imports_the_code_of_a_folder(
    evil: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(evil)
    marker = tmp_path / "marker"
    hostile.write_python(evil, marker)
    said = open_every_door(evil, marker)
    assert any("evil" in sentence for sentence in said)
    with pytest.raises(UserError):
        chat(evil)


def test_no_template_leaves_its_sandbox(evil: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (evil / "chat_template.jinja").write_text(hostile.template(marker))
    open_every_door(evil, marker)
    with pytest.raises(UserError, match="chat template"):
        chat(evil)
    assert not marker.exists()


def test_an_adapter_cannot_name_a_module_to_import(
    tiny: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings |= {"megatron_config": {"a": 1}, "megatron_core": "evil"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    said = open_every_door(folder, marker)
    assert sum("Megatron" in sentence for sentence in said) >= 4


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system", "!!python/object/new:os.system"]
)
def test_a_frozen_configuration_has_no_tags(tag: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    (tmp_path / "config.yaml").write_text(f"data: {tag} ['touch {marker}']\n")
    with pytest.raises(UserError, match=r"config\.yaml is not a frozen configuration"):
        store.load(tmp_path / "config.yaml")
    assert not marker.exists()


def test_rows_name_no_class(tmp_path: Path) -> None:
    """pyarrow once unpickled the type of an extension."""
    marker = tmp_path / "marker"
    for data in hostile.pickles(marker).values():
        names = {"ARROW:extension:name": b"arrow.py_extension_type"}
        field = pyarrow.field(
            "a", pyarrow.int64(), metadata={**names, "ARROW:extension:metadata": data}
        )
        table = pyarrow.table({"a": [1]}, schema=pyarrow.schema([field]))
        with pyarrow.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
            writer.write_table(table)
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        assert [row for _, row in read_arrow(tmp_path / "a.arrow")] == [{"a": 1}]
        assert [row for _, row in read_parquet(tmp_path / "a.parquet")] == [{"a": 1}]
        assert not marker.exists()


def test_a_model_of_a_billion_layers_is_not_built(evil: Path) -> None:
    said = json.loads((evil / "config.json").read_text())
    (evil / "config.json").write_text(json.dumps({**said, "num_hidden_layers": 10**9}))
    for door in (consolidate, chat, train):
        with pytest.raises(UserError, match=r"config\.json: num_hidden_layers is 1000000000"):
            door(evil)
