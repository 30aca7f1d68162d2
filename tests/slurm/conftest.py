"""Slurm clusters: one for the session, and one whose nodes can be disconnected."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Iterator

import pytest

from tests.helpers import slurm as daemons


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use one thread, as on the nodes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def slurm() -> Iterator[daemons.Slurm]:
    """A cluster of two nodes."""
    yield from running(nodes=2)


@pytest.fixture
def apart() -> Iterator[daemons.Slurm]:
    """A cluster of three nodes, each in its own network namespace."""
    yield from running(nodes=3, apart=True)


def running(nodes: int, apart: bool = False) -> Iterator[daemons.Slurm]:
    """A cluster that is started and stopped; skips the test where none can be."""
    if why := daemons.missing(apart):
        pytest.skip(f"NO REAL SLURM: {why}")
    made = daemons.Slurm(nodes, apart)
    try:
        made.start()
    except (AssertionError, subprocess.CalledProcessError) as error:
        words = made.words()
        made.stop()
        # A skip alone would hide a broken helper.
        warnings.warn(
            f"NO REAL SLURM: its daemons do not start here: {error}\n{words}", stacklevel=1
        )
        pytest.skip("NO REAL SLURM: its daemons do not start here")
    yield made
    made.stop()
