"""Devices and packages are detected on this machine without importing the packages."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from launcher.cluster import devices


def test_flash_attention_is_found_by_its_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    (tmp_path / "flash_attn").mkdir()  # version 4 has such a folder too
    assert not devices.has_flash_attention()
    installed = tmp_path / "flash_attn-2.8.3.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Name: flash-attn\nVersion: 2.8.3\n")
    importlib.invalidate_caches()
    assert devices.has_flash_attention()


def test_liger_needs_its_package_and_triton(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    for name in ("liger_kernel", "triton"):
        assert not devices.has_liger()
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError  # nothing is imported")
        importlib.invalidate_caches()
    assert devices.has_liger()


@pytest.mark.parametrize(("value", "interprets"), [(None, False), ("0", False), ("1", True)])
def test_triton_is_interpreted_if_the_environment_requests_it(
    monkeypatch: pytest.MonkeyPatch, value: str | None, interprets: bool
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert devices.interprets_triton() is interprets
