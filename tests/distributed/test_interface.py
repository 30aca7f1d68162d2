"""Which network interface a rank uses. Nodes with networks of their own: tests/slurm."""

from __future__ import annotations

import os
import socket
import threading

import pytest
import torch.distributed as dist

from launcher.distributed import interface
from launcher.distributed.interface import Link
from launcher.errors import UserError

OWN = Link("n1", "this machine")
MINUTES = 1 / 6


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (interface.GLOO, interface.NCCL):
        monkeypatch.setenv(name, "")  # so that it is taken away again
        monkeypatch.delenv(name)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


def settled(asked: str, world: int = 2) -> list[list[Link] | str]:
    """What each rank of a machine gets: all links, or the message of its refusal."""
    store = dist.HashStore()
    results: list[list[Link] | str] = [""] * world
    said: list[str] = []

    def rank_of(rank: int) -> None:
        try:
            results[rank] = interface.settle(store, rank, world, asked, MINUTES, said.append)
        except UserError as error:
            results[rank] = str(error)

    threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_on_one_machine_nothing_is_changed() -> None:
    for links in settled("auto"):
        assert [(link.interface, link.problem) for link in links] == [("", "")] * 2
    assert interface.GLOO not in os.environ
    assert interface.NCCL not in os.environ


def test_an_interface_that_is_asked_for_is_used_on_one_machine_too() -> None:
    for links in settled("lo"):
        assert [(link.interface, link.address) for link in links] == [("lo", "127.0.0.1")] * 2
    assert os.environ[interface.GLOO] == "lo"
    assert os.environ[interface.NCCL] == "=lo", "not as the beginning of a name"


def test_all_ranks_say_which_interface_does_not_exist() -> None:
    first, second = settled("ib7")
    assert first == second
    assert f"cluster.interface=ib7: {socket.gethostname()} has no interface ib7" in str(first)
    assert "lo (127.0.0.1)" in str(first)
    assert "cluster.interface=auto" in str(first)


@pytest.mark.parametrize(
    ("variable", "asked", "said"),
    [
        ("ib7", "auto", "GLOO_SOCKET_IFNAME=ib7: n1 has no interface ib7"),
        ("lo", "auto", "GLOO_SOCKET_IFNAME=lo: other machines cannot reach n1 at 127.0.0.1"),
        ("lo", "eth7", "cluster.interface=eth7, but n1 has GLOO_SOCKET_IFNAME=lo"),
        ("", "lo", "cluster.interface=lo: other machines cannot reach n1 at 127.0.0.1"),
        ("", "auto", "n1 has no route to the other machines at 127.0.1.1"),
    ],
)
def test_an_interface_that_reaches_no_other_machine_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, asked: str, said: str
) -> None:
    monkeypatch.setenv(interface.GLOO, variable)
    with pytest.raises(UserError) as refused:
        interface.choose(OWN, asked, "127.0.1.1", several=True)
    assert said in str(refused.value)
    assert "→" in str(refused.value)


def test_a_variable_of_the_user_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(interface.GLOO, "lo")
    monkeypatch.setenv(interface.NCCL, "ib")
    assert settled("auto")[0][0].interface == "lo"
    assert (os.environ[interface.GLOO], os.environ[interface.NCCL]) == ("lo", "ib")


def test_the_log_names_few_machines_and_counts_many() -> None:
    links = [Link(f"n{at // 2}", f"id {at // 2}", "eth0", f"10.0.0.{at // 2}") for at in range(10)]
    assert interface.describe(links[:4]) == "network: eth0 (n0 10.0.0.0, n1 10.0.0.1)"
    assert interface.describe(links) == "network: eth0 on 5 machines"
    assert interface.describe([OWN]) == ""
