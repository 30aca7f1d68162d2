"""Nodes with separate networks, whose names resolve to addresses that no other node reaches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.commands import losses
from tests.helpers.slurm import LONG, Slurm, out_of, submit
from tests.slurm.conftest import running

OVER = ("COMPLETED", "FAILED", "CANCELLED")
WORDS = (*LONG, "training.max_steps=3", "cluster.nodes=2", "run_dir=far")


@pytest.fixture(scope="module")
def debian() -> Iterator[Slurm]:
    """Two nodes whose own names resolve to 127.0.1.1, as Debian's installer writes it."""
    for made in running(nodes=2, apart=True):
        for node in made.nodes:
            made.resolve(node, "127.0.1.1")
        yield made


def ended(slurm: Slurm, job: str, far: Path) -> str:
    """The state in which a job has ended."""
    slurm.until(lambda: slurm.state(job) in OVER, 120)
    assert [path.name for path in far.glob("logs/attempt-*")] == ["attempt-1"], out_of(far)
    return slurm.state(job)


def test_ranks_meet_although_their_names_resolve_to_a_loopback_address(
    debian: Slurm, tiny: Path, tmp_path: Path
) -> None:
    far = tmp_path / "far"
    job = submit(debian, tmp_path, *WORDS, "cluster.preflight=true")
    assert ended(debian, job, far) == "COMPLETED", out_of(far)
    assert len(losses(far)) == 3
    assert "preflight: 2 ranks on 2 machines" in out_of(far)
    for node in debian.nodes:
        assert f"warning: {node} resolves its own name to 127.0.1.1" in out_of(far)
    assert "network: eth0 (n1 10.213.77.1, n2 10.213.77.2)" in out_of(far)


@pytest.mark.parametrize(
    ("words", "variables", "said"),
    [
        (
            ["cluster.interface=ib7"],
            {},
            "cluster.interface=ib7: n1 has no interface ib7 that is up",
        ),
        ([], {"GLOO_SOCKET_IFNAME": "lo"}, "GLOO_SOCKET_IFNAME=lo: other machines cannot reach n1"),
    ],
    ids=["no such interface", "the loopback interface"],
)
def test_an_interface_that_cannot_be_used_ends_the_job_at_once(
    debian: Slurm, tiny: Path, tmp_path: Path,
    words: list[str], variables: dict[str, str], said: str,
) -> None:  # fmt: skip
    far = tmp_path / "far"
    job = submit(debian, tmp_path, *WORDS, *words, variables=variables)
    assert ended(debian, job, far) == "FAILED"
    assert "ExitCode=2:0" in debian.ask("scontrol", "show", "job", "-o", job)
    assert said in out_of(far)
    error = json.loads((far / "logs/attempt-1/rank-00.error.json").read_text())
    assert not error["lost_peer"]
