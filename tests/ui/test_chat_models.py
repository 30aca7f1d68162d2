"""The models offered for chat and export, and references from them to paths outside the roots."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from launcher.errors import UserError
from launcher.ui import chat_models
from launcher.ui.chat_models import LoadedModels
from launcher.ui.context import PageContext
from launcher.ui.i18n import ENGLISH
from launcher.ui.roots import Roots
from launcher.ui.tabs.export import ExportTab, _refuse_pickles


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Roots:
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    return Roots.of([tmp_path / "home"])


def adapter(folder: Path, base: Path) -> Path:
    folder.mkdir(parents=True)
    settings = {"base_model_name_or_path": str(base), "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def test_an_empty_home_offers_only_downloaded_models(roots: Roots, tiny: Path) -> None:
    assert str(tiny) in chat_models.chat_choices(roots)
    assert chat_models.export_choices(roots) == []


def test_the_base_of_an_adapter_must_be_inside_the_roots(
    roots: Roots, tmp_path: Path, tiny: Path
) -> None:
    shutil.copytree(tiny, tmp_path / "outside")  # a valid chat target
    found = adapter(roots.home / "adapter", tmp_path / "outside")
    assert list(chat_models.base_folders(found)) == [str(tmp_path / "outside")]
    tab = object.__new__(ExportTab)
    tab.context, tab.translate = PageContext(roots), ENGLISH
    with pytest.raises(UserError, match="outside is outside"):
        tab._arguments("adapter", "", "", "5GB", "auto", "cpu", False)
    with pytest.raises(UserError, match="outside is outside"):
        LoadedModels(roots).load("A", "adapter", "")


def test_the_export_command_follows_from_the_form(roots: Roots, tiny: Path) -> None:
    tab = object.__new__(ExportTab)
    tab.context, tab.translate = PageContext(roots), ENGLISH
    words, target = tab._arguments(str(tiny), "", "out", "2GB", "bf16", "auto", False)
    assert target == roots.home / "out"
    assert words == [
        *("consolidate", str(tiny), "--output", str(target), "--max-shard-size=2GB"),
        *("--dtype", "bf16", "--device", "auto", "--json", "--progress-seconds", "0.5", "--resume"),
    ]
    assert tab._arguments(str(tiny), "", "out", "2GB", "bf16", "auto", True)[0][-1] == "--overwrite"
    with pytest.raises(UserError, match="is outside"):
        tab._arguments(str(tiny), "", "../out", "2GB", "bf16", "auto", False)
    with pytest.raises(UserError, match="is outside"):  # next to a model in the cache
        tab._arguments(str(tiny), "", "", "2GB", "bf16", "auto", False)


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="neither a run nor a folder with safetensors"):
        _refuse_pickles(tmp_path)
