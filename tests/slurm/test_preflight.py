"""`cluster.preflight=true` on nodes with separate networks: the bad one is named."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.commands import losses
from tests.helpers.slurm import LONG, Slurm, out_of, submit
from tests.slurm.conftest import running

OVER = ("COMPLETED", "FAILED", "CANCELLED")
NODES = 3
WORDS = (*LONG, "training.global_batch_size=6", "training.max_steps=3", f"cluster.nodes={NODES}")
WORDS += ("run_dir=far", "cluster.preflight=true")
# In place of a function of one module, on the node that imports this.
SITE = """\
import importlib.util, sys, time

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "{module}":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module
        def exec_module(module):
            execute(module)
            plain = module.{function}
            module.{function} = lambda *given: {instead}
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""
MEASURE = {"module": "launcher.machines.measure", "function": "product"}


@pytest.fixture(scope="module")
def three() -> Iterator[Slurm]:
    """Three nodes, each in its own network namespace."""
    yield from running(nodes=NODES, apart=True)


def python_on(node: str, folder: Path) -> str:
    """A Python that on `node` looks for modules in `folder` first."""
    wrapper = folder / "python"
    lines = ["#!/bin/sh", f'[ "$(hostname)" = {node} ] && PYTHONPATH="{folder}:$PYTHONPATH"']
    lines += ["export PYTHONPATH", f'exec {sys.executable} "$@"']
    wrapper.write_text("\n".join(lines) + "\n")
    wrapper.chmod(0o755)
    return f"cluster.container_python={wrapper}"


def ended(slurm: Slurm, cwd: Path, *words: str, far: str = "far") -> tuple[str, str]:
    """(exit code as Slurm shows it, what was printed) of a job that is not queued again."""
    job, run = submit(slurm, cwd, *WORDS, *words), cwd / far
    slurm.until(lambda: slurm.state(job) in OVER, 150)
    said = out_of(run)
    assert [path.name for path in run.glob("logs/attempt-*")] == ["attempt-1"], said
    exit_code = re.search(r"ExitCode=(\S+)", slurm.ask("scontrol", "show", "job", "-o", job))
    assert exit_code
    return exit_code[1], said


@pytest.mark.whole
def test_a_run_on_good_nodes_trains(three: Slurm, tiny: Path, tmp_path: Path) -> None:
    """Although the name of one resolves to a loopback address (of all: test_network.py)."""
    three.resolve("n2", "127.0.1.1")
    code, said = ended(three, tmp_path)
    three.resolve("n2", "10.213.77.2")
    assert code == "0:0", said
    assert len(losses(tmp_path / "far")) == 3
    assert "preflight: warning: n2 resolves its own name to 127.0.1.1; the ranks use eth0" in said
    assert "preflight: 3 ranks on 3 machines" in said
    assert re.search(r"pairs [\d,]+ MB/s or more, clocks within", said), said


@pytest.mark.whole
@pytest.mark.parametrize(
    ("instead", "said"),
    [
        ("(time.sleep(0.1), plain(*given))[1]", "n3: a matrix product takes 10"),
        ("plain(*given) + 1", "n3, rank 2: a matrix product has other bits than on other ranks"),
    ],
    ids=["slow", "wrong"],
)
def test_a_node_that_computes_badly_is_named(
    three: Slurm, tiny: Path, tmp_path: Path, instead: str, said: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SITE.format(**MEASURE, instead=instead))
    code, printed = ended(three, tmp_path, python_on("n3", tmp_path))
    assert code == "69:0", printed
    assert said in printed
    assert "→ --exclude=n3 (cluster.exclude=n3)" in printed


@pytest.mark.whole
def test_a_node_with_another_package_is_named(three: Slurm, tiny: Path, tmp_path: Path) -> None:
    """Also the first: what most nodes have is right."""
    info = tmp_path / "peft-0.0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.0.1\n")
    code, said = ended(three, tmp_path, python_on("n1", tmp_path))
    assert code == "69:0", said
    assert "n1: peft 0.0.1 (elsewhere " in said
    assert "→ --exclude=n1 (cluster.exclude=n1)" in said


@pytest.mark.whole
@pytest.mark.parametrize("what", ["run folder", "data"])
def test_a_node_that_sees_other_files_is_named(
    three: Slurm, tiny: Path, tmp_path: Path, what: str
) -> None:
    rows = tmp_path / "rows/rows.jsonl"
    rows.parent.mkdir()
    turns = '[{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]'
    rows.write_text(f'{{"messages": {turns}}}\n' * 12)
    other = tmp_path / "other"
    if what == "run folder":
        (tmp_path / "runs").mkdir()
        other.mkdir()
        three.mount("n2", other, tmp_path / "runs")
        code, said = ended(three, tmp_path, "run_dir=runs/far", far="runs/far")
        assert code == "69:0", said
        assert "n2 does not see " in said
        assert "--exclude=n2" in said
        return
    other.mkdir()
    (other / "rows.jsonl").write_text(rows.read_text().replace("yes", "no!"))
    three.mount("n2", other, rows.parent)
    code, said = ended(three, tmp_path, "data=messages", f"data.path={rows}")
    assert code == "69:0", said
    assert f"n2: data file {rows} has another content than elsewhere" in said
    assert "→ --exclude=n2 (cluster.exclude=n2)" in said


@pytest.mark.whole
def test_a_node_to_which_no_connection_is_made_is_named(
    three: Slurm, tiny: Path, tmp_path: Path
) -> None:
    """Its address is answered by nobody: it listens at another one."""
    site = {"module": "launcher.machines.measure", "function": "listening"}
    instead = "__import__('contextlib').nullcontext(9)"
    (tmp_path / "sitecustomize.py").write_text(SITE.format(**site, instead=instead))
    code, said = ended(three, tmp_path, python_on("n2", tmp_path))
    assert code == "69:0", said
    assert "n2: no TCP connection with n1, n3" in said
    assert "→ --exclude=n2 (cluster.exclude=n2)" in said
