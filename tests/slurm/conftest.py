"""A Slurm of two nodes for the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers import slurm as daemons


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[daemons.Slurm]:
    if why := daemons.missing():
        pytest.skip(f"NO REAL SLURM: {why}")
    made = daemons.Slurm(tmp_path_factory.mktemp("slurm"))
    made.start()
    yield made
    made.stop()
