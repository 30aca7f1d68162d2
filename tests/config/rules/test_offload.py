"""Checks before launch of state in host memory and on disk."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.cluster import build_ops, preflight
from launcher.config import deepspeed, store
from launcher.config.compose import compose_command_line
from launcher.config.schema.strategy import STRATEGIES, ZeroConfig
from launcher.errors import UserError
from launcher.folders.run import RunDir
from tests.helpers.compose import composed_raw

pytestmark = pytest.mark.usefixtures("tiny")


def check(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """Check the configuration in the same way as the command line."""
    monkeypatch.setattr(sys, "argv", ["shardway train", "model=tiny", *words])
    for config in compose_command_line():
        preflight.check(config)


def told(name: str, **options: Any) -> dict[str, Any]:
    """The ZeRO section of the configuration that DeepSpeed receives."""
    config = store.build(composed_raw(strategy={"name": name, **options}))
    assert isinstance(config.strategy, ZeroConfig)
    zero = deepspeed.engine_config(config.strategy, config.training, config.precision, 2)
    assert zero["zero_force_ds_cpu_optimizer"] is False
    return zero["zero_optimization"]  # type: ignore[no-any-return]


def test_strategy_names_determine_where_state_is_stored() -> None:
    offloaded = [name for name, schema in STRATEGIES.items() if schema(name=name).steps_on_cpu]
    assert offloaded == ["fsdp_offload", "zero2_offload", "zero3_offload"]
    for name in ("zero1", "zero2", "zero3"):
        assert told(name)["offload_optimizer"] == {"device": "none"}
    assert told("zero2_offload")["offload_optimizer"] == {"device": "cpu"}
    assert "offload_param" not in told("zero2_offload")
    assert told("zero3_offload")["offload_optimizer"] == {"device": "cpu"}
    assert told("zero3_offload")["offload_param"] == {"device": "cpu"}
    on_disk = told("zero3", offload_param="nvme", nvme_path="/disk", nvme_buffer_size=7)
    assert on_disk["offload_param"] == {
        "device": "nvme", "nvme_path": "/disk", "buffer_size": 7, "max_in_cpu": 0,
    }  # fmt: skip
    assert on_disk["stage3_prefetch_bucket_size"] == 0


def test_a_strategy_without_offload_names_those_that_have_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(store.ConfigError, match=r"strategy\.offload is a setting of strategy=fsdp"):
        check(monkeypatch, "strategy=ddp", "+strategy.offload=true")


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_offload_through_strategy_extra_is_refused(
    monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    key = "strategy.extra.zero_optimization.offload_optimizer.device"
    with pytest.raises(store.ConfigError, match=r"contradicts .*offload_optimizer\.device=none"):
        check(monkeypatch, f"strategy={strategy}", f"+{key}=cpu")


def test_disk_offload_is_refused_if_its_extension_cannot_be_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "false")  # a compiler that finds no libaio.h
    words = ("strategy=zero3", "strategy.offload_param=nvme", f"strategy.nvme_path={tmp_path}")
    with pytest.raises(store.ConfigError, match=r"\[nvme-needs-libaio\]"):
        check(monkeypatch, *words)
    check(monkeypatch, *words, "strategy.offload_param=cpu")


def test_a_failed_compilation_names_its_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path)
    run.logs.mkdir(parents=True)
    monkeypatch.setattr(build_ops, "BUILD_ASYNC_IO", "raise SystemExit('no ninja')")
    with pytest.raises(UserError, match=r"cannot be built \(see .*compiler.log"):
        build_ops.build_async_io(run)
    assert "once on this machine" in capsys.readouterr().out
    assert (run.logs / "compiler.log").read_text() == "no ninja\n"
