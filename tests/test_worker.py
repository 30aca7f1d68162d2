"""The programs that a launcher starts: what they say to a person who starts them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MODULES = (
    "launcher.worker",
    "launcher.cluster.agent",
    "launcher.cluster.node",
    "launcher.cluster.job",
)
AGENT = ("-m", "launcher.worker")  # the last words of an agent's command line before RUN ATTEMPT
WRONG = {
    "launcher.worker": [(), ("no-run", "1"), ("no-run", "x", "y")],
    "launcher.cluster.agent": [(), (*AGENT, "no-run", "1"), (*AGENT, "no-run", "one")],
    "launcher.cluster.node": [(), ("no-run/logs/attempt-1",), ("no-run",)],
    "launcher.cluster.job": [(), ("begin",), ("begin", "--run"), ("end", "no-run"), ("other",)],
}


@pytest.mark.parametrize(
    ("module", "arguments", "in_a_job"),
    [
        *((module, each, False) for module in MODULES for each in WRONG[module][:1]),
        *((module, each, True) for module in MODULES for each in WRONG[module][1:]),
    ],
)
def test_a_program_that_is_not_started_by_a_launcher_says_so(
    tmp_path: Path, module: str, arguments: tuple[str, ...], in_a_job: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name in ("RANK", "SLURM_NODEID") if in_a_job else ():
        monkeypatch.setenv(name, "0")
    if arguments[:1] == ("end",):
        monkeypatch.setenv("SLURM_JOB_ID", "7")
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "usage" in done.stderr or "is not the folder of an attempt" in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
