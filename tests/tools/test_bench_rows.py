"""Every row of every benchmark is a configuration that the product accepts on 8 GPUs."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.config import Config
from launcher.config.compose import compose
from launcher.config.rules.rule import Machine, World
from launcher.config.rules.table import broken_rules

TOOLS = Path(__file__).parents[2] / "tools"
GPUS = Machine(gpus=8, flash_attention=True, liger=True)


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module


@pytest.fixture
def refused(tiny: Path) -> Any:
    """The rules that a configuration breaks on a machine with 8 GPUs."""
    return lambda config: broken_rules(config, World.from_config(config, GPUS))


def test_rows_of_the_gpu_benchmark(tool: Any, refused: Any, tiny: Path, tmp_path: Path) -> None:
    bench = tool("bench_gpu")
    bench.texts(tmp_path, rows=8, length=64)
    arguments = bench.parser().parse_args(["--shape", "tiny", "--model", str(tiny)])
    found = {
        row.name: refused(compose(bench.overrides(row, tmp_path, 64, arguments)))
        for row in bench.ROWS
    }
    assert found == {row.name: [] for row in bench.ROWS}


def test_arms_of_the_benchmark_against_peers(
    tool: Any, refused: Any, tiny: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.json"
    tool("peers.rows").write([{"instruction": "a", "input": "", "output": "b"}], rows)
    for arm in filter(lambda arm: arm.is_ours, tool("peers.arms").ARMS):
        job = tool("peers.job").Job(str(tiny), str(rows), "run", 2, 4, 2, 1, 96, arm.settings)
        assert refused(compose(tool("peers.shardway").overrides(job))) == [], arm.name


def configs_of_the_parts(tool: Any, model: Path) -> Iterator[Config]:
    """The configurations of the benchmarks that build the parts of a run."""
    for name in ("bench_memory", "bench_loading"):
        arguments: argparse.Namespace = tool(name)._parser().parse_args([])
        methods = arguments.methods if "methods" in arguments else [arguments.method]
        for method in methods:
            for strategy in arguments.strategies:
                yield tool("bench_parts").config_of(model, strategy, method, arguments.precision)
    for precision in tool("bench_train").PRECISIONS:
        arguments = tool("bench_train")._parser().parse_args(["--precision", precision])
        yield tool("bench_train")._config(model, arguments)


def test_rows_of_the_benchmarks_of_parts(tool: Any, refused: Any, tiny: Path) -> None:
    for config in configs_of_the_parts(tool, tiny):
        broken = [line for line in refused(config) if "[length-of-training]" not in line]
        assert broken == [], config  # the parts get their number of steps from the benchmark
