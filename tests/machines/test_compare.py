"""Which machine is named, from what all of them say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from launcher.cluster.gpu_health import GpuHealth
from launcher.errors import BAD_NODE, BadNode, UserError
from launcher.machines import compare
from launcher.machines.facts import Facts
from launcher.machines.findings import REFUSED, WARNING, Finding, raise_refused

GPU = GpuHealth("H100", "GPU-1", 80 * 10**9, 79 * 10**9, "580.1", True, 0, 40, "")
GOOD = Facts(
    rank=0,
    node="n1",
    versions={"torch": "2.13.0", "peft": "0.21.2"},
    config="c",
    model={"m/config.json": "1", "m/model.safetensors": "2"},
    data={"rows.jsonl": "3"},
    resolves_to=["10.0.0.1"],
    interface="eth0",
    address="10.0.0.1",
    gpus=[GPU, GPU],
)


def three(**odd: Any) -> list[Facts]:
    """Machines n1, n2 and n3; n2 differs."""
    nodes = [replace(GOOD, rank=2 * at, node=f"n{at + 1}") for at in range(3)]
    nodes[1] = replace(nodes[1], **odd)
    return nodes


def test_machines_that_agree_have_no_finding() -> None:
    assert list(compare.find_differences(three())) == []


@pytest.mark.parametrize(
    ("odd", "status", "said"),
    [
        ({"versions": {"torch": "2.13.0", "peft": "0.1"}}, REFUSED, "peft 0.1 (elsewhere 0.21.2)"),
        ({"versions": {"torch": "2.13.0"}}, REFUSED, "peft is missing (elsewhere 0.21.2)"),
        ({"config": "d"}, REFUSED, "config.yaml of the run has another content"),
        ({"model": {"m/config.json": "1"}}, REFUSED, "m/model.safetensors is only elsewhere"),
        ({"data": {"rows.jsonl": "4"}}, REFUSED, "data file rows.jsonl has another content"),
        ({"unreadable": ["data.path=x: Permission denied"]}, REFUSED, "data.path=x: Permission"),
        ({"sees_note": False}, REFUSED, "n2 does not see in the run folder what n1 writes"),
        ({"gpus": [GPU]}, REFUSED, "GPUs 1 × H100 80 GB (elsewhere 2 × H100 80 GB)"),
        ({"gpus": [GPU, replace(GPU, uncorrected=3)]}, REFUSED, "GPU 1 (GPU-1): 3 uncorrected ECC"),
        ({"gpus": [replace(GPU, throttled="hot"), GPU]}, REFUSED, "throttled at 40 °C: hot"),
        ({"gpus": [replace(GPU, driver="1")] * 2}, WARNING, "driver 1 (elsewhere 580.1)"),
        ({"gpus": [replace(GPU, free=9), GPU]}, WARNING, "other processes have 80.0 GB"),
        ({"infiniband": True, "locked_memory": 65536}, WARNING, "locked memory is limited"),
        ({"resolves_to": ["127.0.1.1"]}, WARNING, "resolves its own name to 127.0.1.1"),
    ],
)
def test_the_machine_that_differs_is_named(odd: dict[str, Any], status: str, said: str) -> None:
    found = list(compare.find_differences(three(**odd)))
    assert [each.status for each in found if said in each.text] == [status], found
    for each in found:
        assert each.text.startswith("n2")
        assert each.nodes in (("n2",), ()), each
        assert each.status == WARNING or each.nodes


def test_what_no_machine_can_read_is_no_machine_s_fault() -> None:
    nodes = [replace(each, unreadable=["no such file"]) for each in three()]
    assert list(compare.find_differences(nodes)) == [Finding(REFUSED, "no such file")]


def test_the_first_machine_is_named_if_the_others_agree() -> None:
    nodes = [replace(each, config="d") for each in three()]
    nodes[0] = GOOD
    (found,) = compare.find_differences(nodes)
    assert found.nodes == ("n1",)


@pytest.mark.parametrize(
    ("seconds", "status"), [(1.0, None), (1.4, None), (2.0, WARNING), (4.0, REFUSED)]
)
def test_a_slow_machine_is_warned_of_and_a_very_slow_one_refused(
    seconds: float, status: str | None
) -> None:
    found = list(compare.find_slow("work", {"n1": 1.0, "n2": seconds, "n3": 1.01}))
    assert [each.status for each in found] == ([] if status is None else [status])
    assert all(each.nodes == ("n2",) for each in found)


def test_bits_are_compared_among_devices_of_the_same_kind() -> None:
    results = {f"n{at}, rank {at}": ("A", "x") for at in range(3)} | {"n3, rank 3": ("B", "y")}
    assert list(compare.find_wrong_results(results)) == []
    (found,) = compare.find_wrong_results({**results, "n1, rank 1": ("A", "z")})
    assert found.nodes == ("n1",)


@pytest.mark.parametrize(("rate", "status"), [(0.9, None), (0.3, WARNING), (0.05, REFUSED)])
def test_a_machine_with_a_slow_network_is_named_and_not_its_partners(
    rate: float, status: str | None
) -> None:
    pairs = {("n1", "n2"): rate, ("n1", "n3"): 1.0, ("n2", "n3"): rate}
    found = list(compare.find_narrow(pairs))
    assert [each.status for each in found] == ([] if status is None else [status])
    assert all(each.nodes == ("n2",) for each in found)


def test_one_machine_alone_has_nothing_to_be_compared_with() -> None:
    """Also if it is two for torchrun."""
    assert list(compare.find_narrow({("vm", "vm"): 1.0})) == []
    assert list(compare.find_slow("work", {"vm": 1.0})) == []
    assert list(compare.find_wrong_clocks({"vm": 1.0})) == []


def test_a_clock_that_is_off_is_named() -> None:
    found = list(compare.find_wrong_clocks({"n1": 100.0, "n2": 100.2, "n3": 103.0}))
    assert [(each.status, each.nodes) for each in found] == [(WARNING, ("n3",))]
    found = list(compare.find_wrong_clocks({"n1": 100.0, "n2": 100.2, "n3": 3703.0}))
    assert [(each.status, each.nodes) for each in found] == [(REFUSED, ("n3",))]


def test_the_machine_with_most_failed_connections_is_named() -> None:
    failed = {"n1": ["n2"], "n3": ["n2"], "n2": ["n1", "n3"]}
    (found,) = compare.find_unreachable(failed, machines=3)
    assert found.nodes == ("n2",)
    assert "n2: no TCP connection with n1, n3" in found.text
    (found,) = compare.find_unreachable({"n1": ["n2"], "n2": []}, machines=2)
    assert found.nodes == (), "with two machines nobody knows which is at fault"


def test_single_bad_machines_are_left_out_with_those_that_are_left_out_already() -> None:
    findings = [
        Finding(REFUSED, "a", ("n2",)),
        Finding(REFUSED, "b", ("n3",)),
        Finding(WARNING, ""),
    ]
    with pytest.raises(BadNode) as refused:
        raise_refused(findings, machines=4, excluded="n7")
    assert refused.value.status == BAD_NODE == 69
    assert str(refused.value) == "a\nb\n→ --exclude=n7,n2,n3 (cluster.exclude='n7,n2,n3')"


def test_a_request_that_no_machine_can_meet_is_no_machine_s_fault() -> None:
    with pytest.raises(UserError) as refused:
        raise_refused([Finding(REFUSED, "a"), Finding(REFUSED, "b", ("n3",))], 4, None)
    assert refused.value.status == 2
    assert "exclude" not in str(refused.value)
    raise_refused([Finding(WARNING, "a", ("n1",))], 4, None)
