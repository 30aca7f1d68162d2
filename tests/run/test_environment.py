"""What a rank sets before torch is imported."""

from __future__ import annotations

import os

import pytest

from launcher.run import environment


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*environment.ALLOCATOR_VARIABLES, *environment.DETERMINISTIC):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)


def test_a_rank_gets_segments_that_grow() -> None:
    environment.prepare(deterministic=False)
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert not set(environment.DETERMINISTIC) & set(os.environ)


@pytest.mark.parametrize("name", environment.ALLOCATOR_VARIABLES)
def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "max_split_size_mb:128")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    environment.prepare(deterministic=True)
    found = {each: os.environ.get(each) for each in environment.ALLOCATOR_VARIABLES}
    assert {each for each, value in found.items() if value} == {name}
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_libraries_are_told_to_be_deterministic() -> None:
    environment.prepare(deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["FLASH_ATTENTION_DETERMINISTIC"] == "1"
