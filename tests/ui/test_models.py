"""What there is to talk to and to export, and what it names outside the roots."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from launcher.errors import UserError
from launcher.ui import models
from launcher.ui.export_tab import Tab, _refuse_pickles
from launcher.ui.models import Models
from launcher.ui.page import House
from launcher.ui.places import Places
from launcher.ui.words import ENGLISH


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    return Places.of([tmp_path / "home"])


def adapter(folder: Path, base: Path) -> Path:
    folder.mkdir(parents=True)
    settings = {"base_model_name_or_path": str(base), "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def test_an_empty_home_has_fetched_models_alone(places: Places, tiny: Path) -> None:
    assert str(tiny) in models.subjects(places)
    assert models.sources(places) == []


def test_the_base_that_an_adapter_names_is_confined(
    places: Places, tmp_path: Path, tiny: Path
) -> None:
    shutil.copytree(tiny, tmp_path / "outside")  # one that could be talked to
    found = adapter(places.home / "adapter", tmp_path / "outside")
    assert list(models.bases_of(found)) == [str(tmp_path / "outside")]
    tab = object.__new__(Tab)
    tab.house, tab.words = House(places), ENGLISH
    with pytest.raises(UserError, match="outside is outside"):
        tab._words("adapter", "", "", "5GB", "auto", "cpu", False)
    with pytest.raises(UserError, match="outside is outside"):
        Models(places).load("A", "adapter", "")


def test_the_words_of_an_export(places: Places, tiny: Path) -> None:
    tab = object.__new__(Tab)
    tab.house, tab.words = House(places), ENGLISH
    words, target = tab._words(str(tiny), "", "out", "2GB", "bf16", "auto", False)
    assert target == places.home / "out"
    assert words == [
        *("consolidate", str(tiny), "--output", str(target), "--max-shard-size=2GB"),
        *("--dtype", "bf16", "--device", "auto", "--json", "--progress-seconds", "0.5", "--resume"),
    ]
    assert tab._words(str(tiny), "", "out", "2GB", "bf16", "auto", True)[0][-1] == "--overwrite"
    with pytest.raises(UserError, match="is outside"):
        tab._words(str(tiny), "", "../out", "2GB", "bf16", "auto", False)
    with pytest.raises(UserError, match="is outside"):  # beside a model of the cache
        tab._words(str(tiny), "", "", "2GB", "bf16", "auto", False)


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="neither a run nor safetensors"):
        _refuse_pickles(tmp_path)
