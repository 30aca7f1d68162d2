"""The installed versions are compared with the tested ones."""

from __future__ import annotations

import pytest

from launcher.folders import versions


def test_versions_that_differ_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert versions.describe_mismatch() is None, "the tests run on the tested versions"
    monkeypatch.setattr(
        versions, "tested_versions", lambda: dict.fromkeys(versions.CHECKED_PACKAGES, "0.1")
    )
    assert "torch 2.13" in (versions.describe_mismatch() or "")
