"""Fixtures that many tests share. Everything is created here, offline, in seconds."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before any library reads it: tests neither touch nor depend on the user's cache or the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


LONGEST_FIRST = ("slurm", "end_to_end", "distributed")  # folders, so that no worker ends alone


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    rank = {folder: at for at, folder in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: rank.get(item.path.relative_to(here).parts[0], len(rank)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Two workers (make test) take complete files, whose tests share fixtures; all tests that need
    Slurm go to one worker, because there is only one Slurm. Groups by a mark are lost under pytest
    9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "tests/slurm" if file.startswith("tests/slurm/") else file

    return ByFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache for this test session only; the demo model is linked in if it was fetched."""
    from launcher.folders import paths

    users = paths.cache()
    folder = tmp_path_factory.mktemp("cache")
    (folder / "models").mkdir()
    if (users / "models/smollm2_135m/config.json").is_file():
        (folder / "models/smollm2_135m").symlink_to(users / "models/smollm2_135m")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARDWAY_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny(cache: Path) -> Path:
    """The tiny model with tied embeddings."""
    from launcher.commands.fetch import fetch

    return fetch("tiny")


@pytest.fixture(scope="session")
def tiny_untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from launcher.model.tiny import make_tiny

    folder = tmp_path_factory.mktemp("models") / "untied"
    make_tiny(folder, tie=False, seed=1)
    return folder


@pytest.fixture(scope="session")
def adapter(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT adapter that names the tiny model as its base."""
    from tests.helpers.exports import make_adapter

    return make_adapter(tiny, tmp_path_factory.mktemp("adapter") / "mine")


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirteen conversations of uneven length: no batch of six divides them."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = []
    for number in range(13):
        messages = [{"role": "user", "content": "ask " * (1 + number % 5)}]
        for turn in range(1 + number % 2):
            messages.append(
                {"role": "assistant", "content": f"answer {number} " * (1 + number % 4)}
            )
            if turn < number % 2:
                messages.append({"role": "user", "content": f"and {turn}?"})
        lines.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def ranks() -> Iterator[object]:
    """Four gloo ranks for the session. If one of them fails, four new ranks replace them."""
    from tests.helpers.pool import RankPool

    pool = RankPool(4)
    yield pool
    pool.close()
